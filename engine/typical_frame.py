"""Inputs of an ordinary frame for measuring: the cameras of nuScenes' vehicle on a straight road, noise as pixels, a history.

Time depends on them: attention skips the cameras that do not see a BEV cell, so with matrices of zeros or noise it would do other work.
"""

import numpy as np

from qdbev import temporal
from qdbev.config import ModelConfig
from qdbev.data import rig

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
        "lidar2img": rig.lidar2img(images_shape[0], images_shape[3]).astype(np.float32)[None],
        "can_bus": can_bus,
        "prev_bev": rng.standard_normal((1, rows * columns, model.embed_dim), dtype=np.float32),
        "has_prev": np.ones(1, np.float32),
    }
