"""Images and matrices equal those of the official pipeline, and errors name the file that is unusable."""

import colorsys
import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from golden_inputs import make_intrinsics, make_lidar_from_cam, make_raw_images
from torch.nn import functional

from bench import image_cost
from qdbev import recipes
from qdbev.data import transforms
from qdbev.data.config import DataConfig
from qdbev.data.image_transform import image_transform, scale_lidar2img
from qdbev.data.infos import DatasetError


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    smooth = cv2.resize(make_raw_images()[0, :9, :16], (160, 90))
    assert cv2.imwrite(str(path), smooth)
    return path


def config(**changes: object) -> DataConfig:
    return dataclasses.replace(DataConfig(root=""), **changes)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_images_and_matrices_match_the_official_pipeline(size: str, golden_modules: dict[str, np.ndarray]) -> None:
    data = recipes.RECIPES[size]().data
    transform = image_transform(data, (90, 160))
    images = np.stack([transforms.prepare_image(image, transform) for image in make_raw_images()[:2]])
    assert images.dtype == np.float32
    assert [(*transform.padded_hw, 3)] * 6 == [tuple(shape) for shape in golden_modules[f"pre_{size}_img_shape"]]
    np.testing.assert_allclose(images, golden_modules[f"pre_{size}_img"], atol=1e-6, rtol=0)  # exact scaling, float32 normalisation
    stored = [
        np.block([[k[:3, :3], np.zeros((3, 1))], [np.zeros((1, 3)), 1]]) @ np.linalg.inv(m)
        for k, m in zip(make_intrinsics(), make_lidar_from_cam(), strict=True)
    ]
    scaled = scale_lidar2img(np.stack(stored), data.image_scale)
    np.testing.assert_allclose(scaled, golden_modules[f"pre_{size}_lidar2img"], atol=1e-10)


@pytest.mark.parametrize("scale", [0.5, 0.8, 0.37])
def test_scaling_is_half_pixel_bilinear_without_antialias_after_normalisation(scale: float) -> None:
    data = config(image_scale=scale, std=(1.0, 2.0, 4.0))
    transform = image_transform(data, (90, 160))
    image = make_raw_images()[0]
    normalised = (torch.from_numpy(image[..., ::-1].astype(np.float32)) - torch.tensor(data.mean)) / torch.tensor(data.std)
    height, width = transform.scaled_hw
    expected = functional.interpolate(normalised.permute(2, 0, 1)[None], size=(height, width), mode="bilinear")[0]
    found = transforms.prepare_image(image, transform)
    tolerance = 1 / 200 if scale == 0.37 else 2e-5  # coordinates in float32 and a rounding of 1/512 grey level, or values in float32
    np.testing.assert_allclose(found[:, :height, :width], expected, atol=tolerance, rtol=0)
    assert (found[:, height:] == 0).all()
    assert (found[:, :, width:] == 0).all()
    assert found.shape == {0.5: (3, 64, 96), 0.8: (3, 96, 128), 0.37: (3, 64, 64)}[scale]


def test_files_give_the_same_numbers_as_their_pixels(photo: Path) -> None:
    transform = image_transform(config(), (90, 160))
    loaded = transforms.load_images([photo, photo], transform)
    assert loaded.shape == (2, 3, 64, 96)
    np.testing.assert_array_equal(loaded[1], transforms.prepare_image(cv2.imread(str(photo)), transform))


def test_errors_name_the_unreadable_file(photo: Path) -> None:
    content = photo.read_bytes()

    def refuses(message: str, path: Path = photo) -> None:
        with pytest.raises(DatasetError, match=f"{path.name}.*{message}"):
            transforms.load_images([path], image_transform(config(), (90, 160)))

    photo.write_bytes(content[: len(content) * 2 // 3])
    refuses("is truncated after")
    photo.write_bytes(b"")
    refuses("is truncated after 0 bytes")
    photo.write_bytes(b"not an image")
    refuses("is not an image")
    refuses("No such file", photo.with_name("absent.jpg"))
    cv2.imwrite(str(photo), np.zeros((45, 80, 3), np.uint8))
    refuses("is 45 x 80 pixels .* say 90 x 160")


def test_a_scale_without_any_pixels_left_is_refused() -> None:
    with pytest.raises(DatasetError, match="leaves nothing of images of 90 x 160"):
        image_transform(config(image_scale=0.01), (90, 160))


def distorted_by_loops(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, set[str]]:
    """The image distorted pixel by pixel with the standard library's colour conversion, and the names of the steps that were applied."""
    steps = set()

    def drawn(step: str) -> bool:
        heads = rng.random() < 0.5
        steps.update({step} if heads else set())
        return heads

    out = image.astype(np.float64)
    out = out + rng.uniform(-32, 32) if drawn("brightness") else out
    first = drawn("contrast first")
    out = out * rng.uniform(0.5, 1.5) if first and drawn("contrast") else out
    saturation = rng.uniform(0.5, 1.5) if drawn("saturation") else 1.0
    hue = rng.uniform(-18, 18) if drawn("hue") else 0.0
    for pixel in out.reshape(-1, 3):
        h, s, v = colorsys.rgb_to_hsv(*pixel[::-1])
        pixel[::-1] = colorsys.hsv_to_rgb((h + hue / 360) % 1.0, s * saturation, v)
    out = out * rng.uniform(0.5, 1.5) if not first and drawn("contrast") else out
    return (out[..., rng.permutation(3)] if drawn("channels") else out), steps


def test_distortion_agrees_with_a_loop_over_pixels() -> None:
    image = make_raw_images()[0, :20, :24].clip(40).astype(np.float32)  # stays positive: libraries differ on negative colours
    seen = set()
    for seed in range(24):
        expected, steps = distorted_by_loops(image, np.random.default_rng(seed))
        found = transforms.distort(image, np.random.default_rng(seed))
        np.testing.assert_allclose(found, expected, atol=2e-2)  # float32 hue of up to 360 degrees
        seen |= steps
    assert seen == {"brightness", "contrast first", "contrast", "saturation", "hue", "channels"}


def test_each_image_is_distorted_on_its_own_and_repeatably(photo: Path) -> None:
    transform = image_transform(config(), (90, 160))
    first, again = (transforms.load_images([photo] * 3, transform, np.random.default_rng(1)) for _ in range(2))
    plain = transforms.load_images([photo], transform)[0]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.allclose(first[0], plain, atol=0.05)
    assert (first[:, :, 45:] == 0).all()


def test_the_cost_of_a_frames_images_is_measured_and_written(tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    image_cost.main(["--root", str(tiny_world), "--frames", "3", "--out", str(out)])
    figures = json.loads(out.read_text())
    assert 0 < figures["decode_ms"] < figures["load_ms"]
    assert (figures["frames"], figures["image_hw"], figures["scale"]) == (3, [180, 320], 0.5)
    assert f"{figures['load_ms']:.1f} ms" in capsys.readouterr().out
