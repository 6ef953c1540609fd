"""Two frames of noise, seen by the synthetic rig, to run a network on where there is no data."""

import numpy as np

from qdbev import can_bus as layout
from qdbev.data import rig
from qdbev.schema import Frame

PIXEL_STD = 57.0
"""Standard deviation of a pixel of ordinary photographs, on the 0-255 scale."""
_STEP = np.array((2.5, 0.1, 0.0))
"""Metres between the two frames: half a second at 5 m/s."""
_TURN = np.deg2rad(2.0)


def noise_frames(num_cameras: int, image_hw: tuple[int, int], pixel_std: float = 1.0) -> tuple[Frame, Frame]:
    """Successive frames of one scene, of a car that drives and turns; the same ones at every call.

    Args:
        num_cameras: Images a frame.
        image_hw: Height and width of each, padded.
        pixel_std: Standard deviation of the normalised pixels, so that they fill the ranges that calibration found.
    """
    rng = np.random.default_rng(0)
    lidar2img = rig.lidar2img(num_cameras, image_hw[1]).astype(np.float32)
    first, second = (_frame(rng, index, lidar2img, image_hw, pixel_std) for index in (0, 1))
    return first, second


def _frame(rng: np.random.Generator, index: int, lidar2img: np.ndarray, image_hw: tuple[int, int], pixel_std: float) -> Frame:
    can_bus = np.zeros(layout.SIZE)
    can_bus[layout.POSITION] = index * _STEP
    can_bus[layout.YAW_RAD] = index * _TURN
    can_bus[layout.YAW_DEG] = np.rad2deg(index * _TURN)
    return Frame(
        token=f"synthetic_{index}",
        scene_token="synthetic",
        timestamp_us=index * 500_000,
        images=rng.standard_normal((len(lidar2img), 3, *image_hw), dtype=np.float32) * np.float32(pixel_std),
        lidar2img=lidar2img,
        can_bus=can_bus,
        boxes=np.zeros((0, 9), np.float32),
        labels=np.zeros(0, np.int64),
    )
