"""Parameters of the image preprocessing: sizes, scale and normalisation. qdbev/data/transforms.py applies them.

Images are scaled first, then padded at the bottom and right up to a multiple, as in BEVFormer 66b65f3 (datasets/pipelines/transform_3d.py).
"""

from dataclasses import dataclass

import numpy as np

from qdbev.data.config import DataConfig
from qdbev.data.infos import DatasetError


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Preprocessing that is the same for every image of a dataset. Sizes are (height, width) in pixels."""

    image_hw: tuple[int, int]
    """Size of the stored images."""
    scale: float
    scaled_hw: tuple[int, int]
    padded_hw: tuple[int, int]
    """Size of the network's input images."""
    mean: np.ndarray
    """(3,) float32 in the network's channel order, on the 0-255 scale, as `std`."""
    std: np.ndarray
    to_rgb: bool
    """Reverse the stored order blue, green, red."""


def image_transform(config: DataConfig, image_hw: tuple[int, int]) -> ImageTransform:
    """The preprocessing for stored images of `image_hw` (height, width). Raises DatasetError if scaled images would have no pixels."""
    height, width = image_hw
    scaled_hw = (int(height * config.image_scale), int(width * config.image_scale))
    if min(scaled_hw) < 1:
        raise DatasetError(f"data.image_scale {config.image_scale} leaves nothing of images of {height} x {width} pixels; use a larger one")
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
    """Scale lidar2img (..., 4, 4) from pixels of the stored image to those of the scaled image; padding does not change it."""
    return np.diag((scale, scale, 1.0, 1.0)) @ lidar2img
