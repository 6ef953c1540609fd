"""One real nuScenes key frame goes through the transforms, and its boxes land on its pixels.

To look at it: QDBEV_PICTURE=/tmp/frame.png python -m pytest tests/test_data_real_frame.py
"""

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from qdbev import geometry, recipes
from qdbev.data import transforms
from qdbev.schema import CAMERAS

FOLDER = Path(__file__).parents[2] / "shared/real_frame"
IMAGE_HW = (900, 1600)
EDGES = ((0, 1), (1, 3), (3, 2), (2, 0), (4, 5), (5, 7), (7, 6), (6, 4), (0, 4), (1, 5), (2, 6), (3, 7))

pytestmark = [
    pytest.mark.nuscenes,
    pytest.mark.skipif(not (FOLDER / "frame.json").is_file(), reason=f"no real nuScenes frame at {FOLDER}"),
]


@pytest.fixture(scope="module")
def frame() -> dict[str, Any]:
    return json.loads((FOLDER / "frame.json").read_text())


@pytest.fixture(scope="module")
def transform() -> transforms.ImageTransform:
    return transforms.image_transform(recipes.tiny().data, IMAGE_HW)


@pytest.fixture(scope="module")
def images(frame: dict[str, Any], transform: transforms.ImageTransform) -> np.ndarray:
    return transforms.load_images([FOLDER / frame["images"][camera]["img_path"] for camera in CAMERAS], transform)


def scaled_lidar2img(frame: dict[str, Any], scale: float) -> np.ndarray:
    """(6, 4, 4) from the lidar frame to pixels of the scaled image."""
    matrices = []
    for camera in CAMERAS:
        calibration = frame["images"][camera]
        img_from_cam = geometry.rigid(np.array(calibration["cam2img"]), np.zeros(3))
        matrices.append(img_from_cam @ np.array(calibration["lidar2cam"]))
    return transforms.scale_lidar2img(np.stack(matrices), scale)


def corners(box: list[float]) -> np.ndarray:
    """(8, 3) corners of (x, y, z, l, w, h, yaw), yaw counter-clockwise from x."""
    unit = np.array([[i, j, k] for i in (-0.5, 0.5) for j in (-0.5, 0.5) for k in (-0.5, 0.5)])
    return unit * box[3:6] @ geometry.rotation_z(box[6]).T + box[:3]


def draw(images: np.ndarray, lidar2img: np.ndarray, boxes: list[list[float]], transform: transforms.ImageTransform, path: Path) -> None:
    """Write the six network inputs, back in colours, with the boxes in front of each camera."""
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


def test_real_images_are_normalised_and_padded(images: np.ndarray, transform: transforms.ImageTransform) -> None:
    assert images.shape == (6, 3, 480, 800)
    assert (images[:, :, 450:] == 0).all()
    for planes in images:
        assert 0.3 < planes[:, :450].std() < 1.7
        assert abs(planes[:, :450].mean()) < 1.2
    sky, road = images[0, 2, :60].mean(), images[0, 2, 300:420].mean()
    assert sky > road


def test_measured_objects_in_front_of_a_camera_appear_in_an_image(frame: dict[str, Any], transform: transforms.ImageTransform) -> None:
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
    frame: dict[str, Any], images: np.ndarray, transform: transforms.ImageTransform, tmp_path: Path
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
