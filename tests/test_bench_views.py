"""The pictures show the encoder's reference points, the features and the BEV at the right places."""

import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from bench import draw_views, views
from bench.draw_views import Views
from eval.draw import Page
from qdbev import artifact, geometry
from qdbev.config import to_dict
from qdbev.data.config import DataConfig
from qdbev.data.dataset import FrameDataset
from qdbev.data.image_transform import image_transform
from qdbev.data.transforms import prepare_image
from qdbev.detector import Output
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.facts import TeacherFacts
from qdbev.recipes import RECIPES
from qdbev.schema import CAMERAS

HOTTEST = np.array(matplotlib.colormaps["inferno"](1.0))[:3] * 255


@pytest.fixture(scope="module")
def dataset(tiny_world: Path) -> FrameDataset:
    config = RECIPES["micro"]()
    return FrameDataset(dataclasses.replace(config.data, root=str(tiny_world)), config.model.pc_range, "val", training=False, seed=0)


@pytest.fixture(scope="module")
def model() -> BEVFormer:
    torch.manual_seed(0)
    return BEVFormer(RECIPES["micro"]().model).eval()


@pytest.fixture(scope="module")
def teacher(model: BEVFormer, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "teacher.pt"
    config = RECIPES["micro"]()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(tiny_world)))
    artifact.save_checkpoint(path, config=to_dict(config), weights=model.state_dict(), parent=None, facts=TeacherFacts())
    return path


@pytest.fixture(scope="module")
def seen(model: BEVFormer, dataset: FrameDataset) -> Views:
    return views.views_of(model, dataset, 1, torch.device("cpu"))


def command(*arguments: object) -> None:
    views.main([str(argument) for argument in arguments])


def pixel(page: Page, axes: matplotlib.axes.Axes, x: float, y: float) -> np.ndarray:
    """(3,) RGB of the page at a point in data coordinates of the axes."""
    page.figure.canvas.draw()
    image = np.asarray(page.figure.canvas.buffer_rgba())
    column, row = axes.transData.transform((x, y)).astype(int)
    return image[image.shape[0] - 1 - row, column, :3].astype(float)


def test_the_command_leaves_two_whole_pictures(teacher: Path, tmp_path: Path) -> None:
    command("--model", teacher, "--out", tmp_path / "out", "--frame", 2)
    drawn = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in drawn] == ["frame_00002_features.png", "frame_00002_points.png"]
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("index", [-1, 4])
def test_a_frame_that_the_split_does_not_have_is_refused(teacher: Path, tmp_path: Path, index: int) -> None:
    with pytest.raises(SystemExit, match=f"error: --frame .*{index}.* 4 frames.* 0 to 3"):
        command("--model", teacher, "--out", tmp_path / "out", "--frame", index)
    assert not (tmp_path / "out").exists()


def test_points_and_visibility_are_those_that_the_encoder_works_with(model: BEVFormer, dataset: FrameDataset, seen: Views) -> None:
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []

    def catch(_: torch.nn.Module, inputs: tuple) -> None:
        caught.append((inputs[4].reference_points, inputs[4].visible))

    handle = model.encoder.layers[0].register_forward_pre_hook(catch)
    views.views_of(model, dataset, 1, torch.device("cpu"))
    handle.remove()
    points, visible = caught[0]
    np.testing.assert_array_equal(seen.points, points[0].numpy())
    np.testing.assert_array_equal(draw_views.seen_by(seen).ravel(), visible[0].sum(0).numpy())
    assert set(np.unique(draw_views.seen_by(seen))) == {0, 1, 2}


def test_features_are_norms_over_channels_of_what_the_network_gives(model: BEVFormer, dataset: FrameDataset, seen: Views) -> None:
    caught: list[Output] = []
    handle = model.register_forward_hook(lambda _, __, result: caught.append(result[0]))
    views.views_of(model, dataset, 1, torch.device("cpu"))
    handle.remove()
    for drawn, level in zip(seen.features, caught[0].image_features, strict=True):
        np.testing.assert_allclose(drawn, (level[0] ** 2).sum(1).sqrt().numpy(), rtol=1e-5)  # float32 sums in another order
    cells = caught[0].bev[0].numpy().reshape(*model.config.bev_hw, -1)
    row, column = 3, 17
    assert seen.bev[row, column] == pytest.approx(np.linalg.norm(cells[row, column] - cells.mean((0, 1))), rel=1e-4)


@pytest.mark.parametrize("to_rgb", [True, False])
def test_the_input_goes_back_to_the_stored_colours(to_rgb: bool) -> None:
    config = DataConfig(root="", image_scale=1.0, to_rgb=to_rgb)
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)  # BGR
    transform = image_transform(config, (40, 64))
    shown = views.colors(prepare_image(image, transform), transform)
    assert shown.shape == (64, 64, 3)
    np.testing.assert_array_equal(shown[:40], image[:, :, ::-1])


def test_every_drawn_point_is_a_visible_one_at_its_pixel(seen: Views) -> None:
    """The expected pixels are computed in float64 from the matrix."""
    index = CAMERAS.index("CAM_BACK")
    height, width = seen.images[index].shape[:2]
    axes = Page(4, 3).axes(0, 0, 4, 3)
    draw_views.draw_points(axes, seen, index, "CAM_BACK")
    clouds = [c.get_offsets() for c in axes.collections if isinstance(c, matplotlib.collections.PathCollection)]
    assert len(clouds) == len(seen.pillars)
    for cloud, pillars in zip(clouds, seen.pillars[:, draw_views.thinned(seen)].astype(np.float64), strict=True):
        cam = np.c_[pillars, np.ones(len(pillars))] @ seen.lidar2img[index].astype(np.float64).T
        pixels = cam[cam[:, 2] > 0, :2] / cam[cam[:, 2] > 0, 2:3]
        inside = ((pixels > 0) & (pixels < (width, height))).all(1)
        assert inside.sum() > 0
        np.testing.assert_allclose(np.asarray(cloud), pixels[inside], atol=0.01)  # float32 in the projection


@pytest.mark.parametrize("recipe", ["micro", "tiny", "small", "base"])
def test_pillars_are_thinned_to_about_four_metres(recipe: str, seen: Views) -> None:
    model = RECIPES[recipe]().model
    rows, columns = model.bev_hw
    pillars = geometry.pillar_points(model.bev_hw, 4, model.pc_range).numpy()
    cells = draw_views.thinned(dataclasses.replace(seen, bev=np.zeros((rows, columns)), pc_range=model.pc_range, pillars=pillars))
    for axis in (0, 1):
        apart = np.diff(np.unique(pillars[0, cells, axis]))
        assert apart.min() == pytest.approx(apart.max(), rel=1e-3)
        assert 3 < apart.mean() < 6


def test_a_bev_cell_is_drawn_where_it_lies(seen: Views) -> None:
    """About row 20 and column 4 of 25 in 64 m: forward and left of the car. Nine cells, as single ones are beyond the scale."""
    hot = np.zeros((25, 25))
    hot[19:22, 3:6] = 1
    page = Page(5, 5)
    axes = page.axes(0.5, 0.5, 4, 4)
    draw_views.draw_bev(axes, dataclasses.replace(seen, bev=hot, truth_boxes=np.zeros((0, 9))))
    x, y = -32 + 4.5 * 2.56, -32 + 20.5 * 2.56
    np.testing.assert_allclose(pixel(page, axes, x, y), HOTTEST, atol=2)
    for other in ((-x, y), (x, -y), (y, x), (x + 5.12, y), (x, y - 5.12)):
        assert np.abs(pixel(page, axes, *other) - HOTTEST).max() > 100


def test_a_feature_is_drawn_over_the_pixels_it_stands_for(seen: Views) -> None:
    height, width = seen.images[2].shape[:2]
    rows, columns = seen.features[0].shape[1:]
    hot = np.zeros_like(seen.features[0])
    hot[2, rows - 2, 3] = 1
    page = Page(4, 3)
    axes = page.axes(0, 0, 4, 3)
    draw_views.draw_features(axes, dataclasses.replace(seen, features=[hot]), 2, 0, matplotlib.colors.Normalize(0, 1))
    u, v = 3.5 * width / columns, (rows - 1.5) * height / rows
    np.testing.assert_allclose(pixel(page, axes, u, v), HOTTEST, atol=2)
    assert np.abs(pixel(page, axes, u, height - v) - HOTTEST).max() > 100
    assert np.abs(pixel(page, axes, width - u, v) - HOTTEST).max() > 100


def test_a_ring_lies_on_the_ground_about_the_car() -> None:
    ego_from_lidar = geometry.rigid(geometry.rotation_z(-1.6), np.array([0.9, 0.1, 1.8]))
    ring = draw_views.ground_ring(20.0, geometry.inverse(ego_from_lidar))
    ego = np.c_[ring, np.ones(len(ring))] @ ego_from_lidar.T
    np.testing.assert_allclose(ego[:, 2], 0, atol=1e-9)
    np.testing.assert_allclose(np.hypot(ego[:, 0], ego[:, 1]), 20, atol=1e-9)
    np.testing.assert_allclose(ring[0], ring[-1], atol=1e-9)
