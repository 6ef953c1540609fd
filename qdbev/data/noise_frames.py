"""Two successive frames whose images are noise, with realistic calibration and motion, to run a network where there is no data."""

import statistics

import numpy as np

from qdbev import can_bus as layout
from qdbev.data import rig
from qdbev.data.config import DataConfig
from qdbev.schema import Frame

PIXEL_STD = 57.0
"""Standard deviation of the pixels of ordinary photographs, on the 0-255 scale."""
_STEP = np.array((2.5, 0.1, 0.0))
"""Motion between the two frames in metres, global frame: half a second at 5 m/s."""
_TURN = np.deg2rad(2.0)
"""Change of heading between the two frames in radians."""


def noise_frames(data: DataConfig, num_cameras: int, image_hw: tuple[int, int]) -> tuple[Frame, Frame]:
    """Two successive frames of one scene, of a vehicle that drives and turns; every call returns the same numbers.

    `data.std` scales the noise, so that normalised pixels have the spread of photographs and fill the ranges that calibration found.
    """
    rng = np.random.default_rng(0)
    lidar2img = rig.lidar2img(num_cameras, image_hw[1]).astype(np.float32)
    pixel_std = np.float32(PIXEL_STD / statistics.mean(data.std))
    frames = []
    for index in (0, 1):
        can_bus = np.zeros(layout.SIZE)
        can_bus[layout.POSITION] = index * _STEP
        can_bus[layout.YAW_RAD] = index * _TURN
        can_bus[layout.YAW_DEG] = np.rad2deg(index * _TURN)
        frame = Frame(
            token=f"synthetic_{index}",
            scene_token="synthetic",
            timestamp_us=index * 500_000,
            images=rng.standard_normal((num_cameras, 3, *image_hw), dtype=np.float32) * pixel_std,
            lidar2img=lidar2img,
            can_bus=can_bus,
            boxes=np.zeros((0, 9), np.float32),
            labels=np.zeros(0, np.int64),
        )
        frames.append(frame)
    return frames[0], frames[1]
