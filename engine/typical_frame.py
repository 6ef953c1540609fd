"""Inputs of an ordinary frame for measuring: the cameras of nuScenes' vehicle on a straight road, noise as pixels, a history.

Time depends on them: attention skips the cameras that do not see a BEV cell, so with matrices of zeros or noise it would do other work.
"""

import numpy as np

from qdbev import temporal
from qdbev.config import ModelConfig
from qdbev.data.synthetic import rig
from qdbev.geometry import inverse, rigid
from qdbev.schema import CAMERAS

_STEP = 2.5
"""Metres since the frame before: half a second at 5 m/s."""


def inputs(model: ModelConfig, images_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays by the names of `schema.INPUTS`, the same at every call. images_shape is (N, 3, height, width), padded."""
    rng = np.random.default_rng(0)
    rows, columns = model.bev_hw
    can_bus = np.zeros((1, 18), np.float32)
    can_bus[0, temporal.POSITION] = (_STEP, 0, 0)  # towards yaw 0
    return {
        "images": rng.standard_normal((1, *images_shape), dtype=np.float32),
        "lidar2img": np.stack([_img_from_lidar(index, images_shape[3]) for index in range(images_shape[0])]).astype(np.float32)[None],
        "can_bus": can_bus,
        "prev_bev": rng.standard_normal((1, rows * columns, model.embed_dim), dtype=np.float32),
        "has_prev": np.ones(1, np.float32),
    }


def _img_from_lidar(camera: int, image_width: int) -> np.ndarray:
    """(4, 4) of a camera of the rig, for images of that width; more cameras than it has repeat it."""
    sensor = rig.make_sensor(CAMERAS[camera % len(CAMERAS)], image_width)
    lidar = rig.make_sensor(rig.LIDAR, image_width)
    cam_from_lidar = inverse(rigid(sensor.ego_from_sensor, sensor.translation)) @ rigid(lidar.ego_from_sensor, lidar.translation)
    return rigid(sensor.intrinsic, np.zeros(3)) @ cam_from_lidar
