"""What happens to every image of a dataset, as sizes and numbers; qdbev/data/transforms.py does it.

Images are scaled first, then padded at the bottom and right up to a multiple, as in BEVFormer 66b65f3
(datasets/pipelines/transform_3d.py).
"""

from dataclasses import dataclass

import numpy as np

from qdbev.data.config import DataConfig
from qdbev.data.infos import DatasetError

NUSCENES_HW = (900, 1600)
"""Stored images of nuScenes."""


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """What happens to every image of a dataset. Sizes are (height, width); mean and std (3,) in the network's channel order."""

    image_hw: tuple[int, int]
    scale: float
    scaled_hw: tuple[int, int]
    padded_hw: tuple[int, int]
    mean: np.ndarray
    std: np.ndarray
    to_rgb: bool


def image_transform(config: DataConfig, image_hw: tuple[int, int]) -> ImageTransform:
    """The transform that `config` asks for, for stored images of size `image_hw`."""
    height, width = image_hw
    scaled_hw = (int(height * config.image_scale), int(width * config.image_scale))
    if min(scaled_hw) < 1:
        raise DatasetError(f"data.image_scale {config.image_scale} leaves nothing of images of {height} x {width}")
    multiple = config.pad_multiple
    return ImageTransform(
        image_hw=image_hw,
        scale=config.image_scale,
        scaled_hw=scaled_hw,
        padded_hw=(-(-scaled_hw[0] // multiple) * multiple, -(-scaled_hw[1] // multiple) * multiple),
        mean=np.array(config.mean, dtype=np.float32),
        std=np.array(config.std, dtype=np.float32),
        to_rgb=config.to_rgb,
    )


def scale_lidar2img(lidar2img: np.ndarray, scale: float) -> np.ndarray:
    """(..., 4, 4) from the lidar frame to pixels of the scaled image; padding at the bottom and right moves no pixel."""
    return np.diag((scale, scale, 1.0, 1.0)) @ lidar2img
