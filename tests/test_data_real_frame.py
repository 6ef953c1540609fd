"""Tests the transforms, the BEV geometry and the network on one real nuScenes key frame, whose boxes must project onto its objects.

The licence of nuScenes (CC BY-NC-SA 4.0) keeps its images out of this repository, so that these tests skip until you provide a frame in
`shared/real_frame` beside the clone: six images, and a file frame.json in the layout of mmdetection3d >= 1.0. Of that file the tests read
`images[camera]` with `img_path`, `cam2img` (3x3) and `lidar2cam` (4x4); `instances` with `bbox_3d` (x, y, z, l, w, h, yaw; gravity centre),
`bbox_label` and `num_lidar_pts`; and `categories`, which maps class names to labels. The thresholds suit sample
ca9a282c9e77460f8360f564131a8af5, the first one of nuScenes-mini, which the demo of mmdetection3d (demo/data/nuscenes) publishes.

To look at the boxes on the images: QDBEV_PICTURE=frame.png python -m pytest tests/test_data_real_frame.py
"""

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from golden_model import forward

from qdbev import geometry, recipes
from qdbev.data import transforms
from qdbev.data.image_transform import ImageTransform, image_transform, scale_lidar2img
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.schema import CAMERAS

FOLDER = Path(__file__).parents[2] / "shared/real_frame"
EDGES = ((0, 1), (1, 3), (3, 2), (2, 0), (4, 5), (5, 7), (7, 6), (6, 4), (0, 4), (1, 5), (2, 6), (3, 7))

MIRRORED = CAMERAS.index("CAM_BACK_RIGHT")
"""Camera whose image is replaced. One cell of the tiny grid projects into the padding of its image, which counts as seen."""
BASE = recipes.RECIPES["base"]().model
CELL = 102.4 / 200
"""Side of a BEV cell of the base grid in metres. The cells are small enough that several are inside a barrier."""

pytestmark = [
    pytest.mark.nuscenes,
    pytest.mark.skipif(
        not (FOLDER / "frame.json").is_file(),
        reason=f"needs a real nuScenes frame, which the licence keeps out of the repository: put frame.json and its six images into "
        f"{FOLDER}; the first lines of this file say which",
    ),
]


@pytest.fixture(scope="module")
def frame() -> dict[str, Any]:
    return json.loads((FOLDER / "frame.json").read_text())


@pytest.fixture(scope="module")
def transform() -> ImageTransform:
    data = recipes.RECIPES["tiny"]().data
    return image_transform(data, data.stored_hw)


@pytest.fixture(scope="module")
def images(frame: dict[str, Any], transform: ImageTransform) -> np.ndarray:
    return transforms.load_images([FOLDER / frame["images"][camera]["img_path"] for camera in CAMERAS], transform)


def scaled_lidar2img(frame: dict[str, Any], scale: float) -> np.ndarray:
    """Return the projections from the lidar frame to pixels of the scaled image, (6, 4, 4)."""
    matrices = []
    for camera in CAMERAS:
        calibration = frame["images"][camera]
        img_from_cam = geometry.rigid(np.array(calibration["cam2img"]), np.zeros(3))
        matrices.append(img_from_cam @ np.array(calibration["lidar2cam"]))
    return scale_lidar2img(np.stack(matrices), scale)


def corners(box: list[float]) -> np.ndarray:
    """Return the corners (8, 3) of a box (x, y, z, l, w, h, yaw) whose yaw is counter-clockwise from x."""
    unit = np.array([[i, j, k] for i in (-0.5, 0.5) for j in (-0.5, 0.5) for k in (-0.5, 0.5)])
    return unit * box[3:6] @ geometry.rotation_z(box[6]).T + box[:3]


def draw(images: np.ndarray, lidar2img: np.ndarray, boxes: list[list[float]], transform: ImageTransform, path: Path) -> None:
    """Write a picture of the six network inputs in their original colours, with the boxes in front of each camera."""
    pictures = []
    for planes, matrix in zip(images, lidar2img, strict=True):
        rgb = planes.transpose(1, 2, 0) * transform.std + transform.mean
        picture = np.ascontiguousarray(rgb[..., ::-1].clip(0, 255).astype(np.uint8))
        for box in boxes:
            cam = np.c_[corners(box), np.ones(8)] @ matrix.T
            if (cam[:, 2] > 0.5).all():
                pixels = (cam[:, :2] / cam[:, 2:3]).round().clip(-2000, 4000).astype(int).tolist()
                for a, b in EDGES:
                    cv2.line(picture, pixels[a], pixels[b], (0, 255, 0), 1, cv2.LINE_AA)
        pictures.append(picture)
    front, back = ([pictures[CAMERAS.index(f"CAM_{view}{side}")] for side in ("_LEFT", "", "_RIGHT")] for view in ("FRONT", "BACK"))
    assert cv2.imwrite(str(path), np.concatenate([np.concatenate(front, 1), np.concatenate(back, 1)]))


def test_real_images_are_normalised_and_padded(images: np.ndarray, transform: ImageTransform) -> None:
    assert images.shape == (6, 3, 480, 800)
    assert (images[:, :, 450:] == 0).all()
    for planes in images:
        assert 0.3 < planes[:, :450].std() < 1.7
        assert abs(planes[:, :450].mean()) < 1.2
    sky, road = images[0, 2, :60].mean(), images[0, 2, 300:420].mean()
    assert sky > road


def test_measured_objects_in_front_of_a_camera_appear_in_an_image(frame: dict[str, Any], transform: ImageTransform) -> None:
    measured = [instance["bbox_3d"] for instance in frame["instances"] if instance["num_lidar_pts"] > 0]
    assert len(measured) > 50
    lidar2img = torch.from_numpy(scaled_lidar2img(frame, transform.scale))[None].float()
    points = torch.tensor([box[:3] for box in measured], dtype=torch.float32)
    _, visible = geometry.project(points[None], lidar2img, transform.scaled_hw)  # (1, 6, K, 1)
    by_camera = visible[0, :, :, 0]
    assert by_camera.any(0).all(), "six cameras see all around"
    assert (by_camera.sum(0) <= 2).all()
    assert (by_camera.sum(1) > 0).sum() >= 5


def test_the_red_barriers_are_red_where_their_boxes_project(
    frame: dict[str, Any], images: np.ndarray, transform: ImageTransform, tmp_path: Path
) -> None:
    lidar2img = scaled_lidar2img(frame, transform.scale)
    barriers = [i["bbox_3d"] for i in frame["instances"] if i["bbox_label"] == frame["categories"]["barrier"] and i["num_lidar_pts"] > 0]
    redness = []
    for planes, matrix in zip(images, lidar2img, strict=True):
        red_over_blue = (planes[0] * transform.std[0] + transform.mean[0]) - (planes[2] * transform.std[2] + transform.mean[2])
        for box in barriers:
            cam = np.c_[corners(box), np.ones(8)] @ matrix.T
            pixels = (cam[:, :2] / cam[:, 2:3]).astype(int)
            (left, top), (right, bottom) = pixels.min(0), pixels.max(0) + 1
            if (cam[:, 2] > 0.5).all() and 0 <= left < right <= 800 and 0 <= top < bottom <= 450:
                redness.append(red_over_blue[top:bottom, left:right].mean())
    assert len(redness) > 20
    assert np.mean(redness) > 20  # grey levels; the six images as a whole are at 1, BGR would give -30, other cameras' matrices about 5

    picture = Path(os.environ.get("QDBEV_PICTURE", tmp_path / "frame.png"))
    draw(images, lidar2img, [instance["bbox_3d"] for instance in frame["instances"]], transform, picture)
    assert cv2.imread(str(picture)).shape == (960, 2400, 3)


def measured_boxes(frame: dict[str, Any]) -> np.ndarray:
    """Return the boxes (G, 7) that contain lidar points and whose centre is inside the BEV grid."""
    boxes = np.array([instance["bbox_3d"] for instance in frame["instances"] if instance["num_lidar_pts"] > 0])
    return boxes[(np.abs(boxes[:, :2]) < 51.2).all(1)]


def base_cells() -> torch.Tensor:
    """Return the cell centres of the base grid (K, 3), row-major, at the lowest of the encoder's reference heights."""
    return geometry.pillar_points(BASE.bev_hw, BASE.num_pillar_points, BASE.pc_range)[0]


def test_the_bev_cell_under_a_box_projects_into_the_outline_of_the_box(frame: dict[str, Any], transform: ImageTransform) -> None:
    """The outline is computed in float64 from the stored matrices; the box is enlarged by half a cell's diagonal on each side."""
    boxes = measured_boxes(frame)
    column, row = ((boxes[:, :2] + 51.2) / CELL).astype(int).T
    cells = base_cells()[torch.from_numpy(row * 200 + column)]
    assert (np.abs(cells[:, :2].numpy() - boxes[:, :2]) < CELL / 2 + 1e-4).all()
    heights = boxes[:, 2] + boxes[:, 5] * np.array([[-0.5], [0.0], [0.5]])
    points = torch.cat((cells[:, :2].expand(3, -1, -1), torch.from_numpy(heights).float()[..., None]), -1)  # (3, G, 3)
    lidar2img = scaled_lidar2img(frame, transform.scale)
    uv, visible = geometry.project(points, torch.from_numpy(lidar2img)[None].float(), transform.padded_hw)
    pixels = uv[0].numpy() * transform.padded_hw[::-1]  # (6, G, 3, 2)
    grown = boxes + np.array([0, 0, 0, CELL * 2**0.5, CELL * 2**0.5, 0, 0])
    inside = []
    for camera, k, height in visible[0].nonzero().tolist():
        cam = np.c_[corners(grown[k]), np.ones(8)] @ lidar2img[camera].T
        if (cam[:, 2] > 0.5).all():
            outline = cv2.convexHull((cam[:, :2] / cam[:, 2:3]).astype(np.float32))
            inside.append(cv2.pointPolygonTest(outline, pixels[camera, k, height].tolist(), measureDist=True))
    assert len(inside) > 3 * 45
    assert min(inside) > -0.01  # pixels; float32 in the projection


def test_cells_under_the_red_barriers_project_onto_red_pixels_and_mistaken_cells_do_not(
    frame: dict[str, Any], images: np.ndarray, transform: ImageTransform
) -> None:
    is_barrier = np.array([i["bbox_label"] == frame["categories"]["barrier"] and i["num_lidar_pts"] > 0 for i in frame["instances"]])
    boxes = np.array([instance["bbox_3d"] for instance in frame["instances"]])[is_barrier]
    red_over_blue = (images[:, 0] * transform.std[0] + transform.mean[0]) - (images[:, 2] * transform.std[2] + transform.mean[2])
    lidar2img = torch.from_numpy(scaled_lidar2img(frame, transform.scale))[None].float()
    height, width = transform.padded_hw

    def redness(points: np.ndarray) -> float:
        uv, visible = geometry.project(torch.from_numpy(points)[None].float(), lidar2img, transform.padded_hw)
        camera, k, _ = visible[0].nonzero().numpy().T
        assert len(k) > 100
        u, v = (uv[0, camera, k, 0].numpy() * (width, height)).astype(int).T
        return float(red_over_blue[camera, v, u].mean())

    cells, under = base_cells().numpy(), []
    for box in boxes:
        along_across = (cells[:, :2] - box[:2]) @ geometry.rotation_z(box[6])[:2, :2]
        inside = cells[(np.abs(along_across) < box[3:5] / 2).all(1)]
        under.append(np.c_[inside[:, :2], np.full(len(inside), box[2])])
    points = np.concatenate(under)
    own = redness(points)
    assert own > 25  # grey levels
    mistaken = {
        "left and right": points * (-1, 1, 1),
        "front and back": points * (1, -1, 1),
        "rows and columns": points[:, [1, 0, 2]],
        "a metre higher": points + (0, 0, 1.0),
        "below the ground": points - (0, 0, 1.5),
    }
    for mistake, wrong in mistaken.items():
        assert redness(wrong) < own - 10, mistake  # the road is slightly red too: 15


@pytest.fixture(scope="module")
def tiny() -> BEVFormer:
    torch.manual_seed(0)
    return BEVFormer(recipes.RECIPES["tiny"]().model).eval()


@torch.no_grad()
def test_a_change_of_one_cameras_image_changes_exactly_the_cells_it_sees_after_one_layer(
    tiny: BEVFormer, frame: dict[str, Any], images: np.ndarray, transform: ImageTransform
) -> None:
    """Temporal attention, which mixes cells, comes first in a layer, so that a changed cell affects others from the second layer on."""
    matrices = scaled_lidar2img(frame, transform.scale)
    lidar2img, can_bus, whole = torch.from_numpy(matrices)[None].float(), torch.zeros(1, 18), torch.from_numpy(images)[None]
    first_layer: list[torch.Tensor] = []
    handle = tiny.encoder.layers[0].register_forward_hook(lambda _, __, bev: first_layer.append(bev[0]))
    output = forward(tiny, (whole, lidar2img, can_bus))
    mirrored = tiny.neck(tiny.backbone(whole[0, MIRRORED : MIRRORED + 1].flip(-1)))
    features = tuple(
        level.index_copy(1, torch.tensor([MIRRORED]), new[None]) for level, new in zip(output.image_features, mirrored, strict=True)
    )
    bev = tiny.encoder(features, lidar2img, can_bus, transform.padded_hw, torch.zeros_like(output.bev), torch.zeros(1))
    handle.remove()

    assert all(torch.isfinite(tensor).all() for tensor in (*output.image_features, *output[1:]))
    assert output.image_features[0].shape == (1, 6, 256, 15, 25)
    assert output.box_code.shape == (6, 1, 900, 10)
    changed = (first_layer[0] != first_layer[1]).any(-1).numpy()
    np.testing.assert_array_equal(changed, cells_seen_by(matrices[MIRRORED], transform.padded_hw))
    later = (output.bev[0] != bev[0]).any(-1).numpy()
    assert (later | ~changed).all()
    assert changed.sum() < later.sum() < later.size


def cells_seen_by(lidar2img: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    """Return which cells of the tiny grid project into a camera's image at one of four heights, (2500,) bool.

    This is computed in float64 and without geometry.py, which it checks.
    """
    centers = -51.2 + (np.arange(50) + 0.5) * 2.048
    x, y, z = (axis.ravel() for axis in np.meshgrid(centers, centers, np.linspace(-4.5, 2.5, 4), indexing="xy"))
    u, v, depth, _ = lidar2img @ np.stack((x, y, z, np.ones_like(x)))
    inside = (depth > 1e-5) & (u > 0) & (u < image_hw[1] * depth) & (v > 0) & (v < image_hw[0] * depth)
    return inside.reshape(2500, 4).any(1)
