"""Makes the network's input frame from a vehicle's data: unscaled camera images, calibration and pose.

The images are scaled and normalised by the same code as in training and evaluation (qdbev/data/transforms.py).
"""

import math
from collections.abc import Sequence

import numpy as np

from qdbev.data.config import DataConfig
from qdbev.data.image_transform import image_transform, scale_lidar2img
from qdbev.data.transforms import prepare_image
from qdbev.schema import CAMERAS, Frame


class FrameError(ValueError):
    """Raised for a frame that does not fit the network. Later frames are not affected."""


class Preprocessor:
    """Makes frames for one network from camera images. N is the number of cameras; H and W are the size of their images before scaling."""

    def __init__(self, config: DataConfig, images_shape: tuple[int, ...]) -> None:
        """Prepare for the data settings of the training, and images_shape (N, 3, height, width) of the network's scaled, padded images."""
        self._config = config
        self._num_cameras = images_shape[0]
        self._padded_hw = (images_shape[2], images_shape[3])

    def frame(
        self, images: Sequence[np.ndarray], lidar2img: np.ndarray, can_bus: np.ndarray, timestamp_us: int, scene_token: str = ""
    ) -> Frame:
        """Make a frame, without annotated objects.

        Args:
            images: N arrays (H, W, 3) uint8 BGR, in the order of `schema.CAMERAS`.
            lidar2img: (N, 4, 4) from the lidar frame (metres) to pixels of these images.
            can_bus: (18,) absolute, as `Frame.can_bus`.
            timestamp_us: Time of the lidar frame in microseconds.
            scene_token: Name of the recording; another name makes the detector forget the frames before.

        Raises:
            FrameError: The number, type or size of the images does not fit the network.
        """
        if len(images) != self._num_cameras:
            names = ", ".join(CAMERAS) if self._num_cameras == len(CAMERAS) else "as in training"
            raise FrameError(f"{len(images)} camera images; the network takes {self._num_cameras} ({names})")
        for index, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape != images[0].shape:
                raise FrameError(f"camera image {index} is {image.dtype}{image.shape}, all must be uint8 (height, width, 3) of one size")
        height, width = images[0].shape[:2]
        transform = image_transform(self._config, (height, width))
        if transform.padded_hw != self._padded_hw:
            low, high = (" x ".join(map(str, ends)) for ends in zip(*map(self._range, self._padded_hw), strict=True))
            raise FrameError(f"camera images of {height} x {width} pixels (height x width); the network takes {low} to {high}")
        return Frame(
            token=str(timestamp_us),
            scene_token=scene_token,
            timestamp_us=timestamp_us,
            images=np.stack([prepare_image(image, transform) for image in images]),
            lidar2img=scale_lidar2img(np.asarray(lidar2img), transform.scale).astype(np.float32),
            can_bus=np.asarray(can_bus, np.float64),
            boxes=np.zeros((0, 9), np.float32),
            labels=np.zeros(0, np.int64),
        )

    @property
    def largest_hw(self) -> tuple[int, int]:
        """Height and width in pixels of the largest camera images that the network takes."""
        return self._range(self._padded_hw[0])[1], self._range(self._padded_hw[1])[1]

    def _range(self, padded: int) -> tuple[int, int]:
        """Smallest and largest side in pixels that scaling and padding turn into `padded`."""
        low, high = padded - self._config.pad_multiple + 1, padded + 1
        return math.ceil(low / self._config.image_scale), math.ceil(high / self._config.image_scale) - 1
