"""Turns camera image files into the network's input: decodes, scales, distorts, normalises and pads them.

The numbers equal those of BEVFormer 66b65f3 (datasets/pipelines/transform_3d.py), which normalises first, then scales (bilinear, half-pixel
centres, no antialiasing), then pads with zeros at the bottom and right. H and W are the stored image's height and width in pixels. Images
have the channel order blue, green, red, as OpenCV reads them.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from qdbev.data.image_transform import ImageTransform
from qdbev.data.infos import DatasetError

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_TAIL = 64
"""Number of bytes at the end of a JPEG file in which the end marker is searched for, as some writers pad their files."""
_FIXED_POINT = 256
"""Pixel values are multiplied by this for scaling in 16-bit integers: eight fractional bits."""


def load_images(paths: Sequence[Path], transform: ImageTransform, rng: np.random.Generator | None = None) -> np.ndarray:
    """(N, 3, *padded_hw) float32 network input from N files, as `read_image` and `prepare_image` make it of each."""
    out = np.zeros((len(paths), 3, *transform.padded_hw), dtype=np.float32)
    for path, planes in zip(paths, out, strict=True):
        _write_planes(read_image(path, transform.image_hw), transform, rng, planes)
    return out


def prepare_image(image: np.ndarray, transform: ImageTransform, rng: np.random.Generator | None = None) -> np.ndarray:
    """(3, *padded_hw) float32 network input from one (H, W, 3) uint8 BGR image, randomly distorted if `rng` is given."""
    planes = np.zeros((3, *transform.padded_hw), dtype=np.float32)
    _write_planes(image, transform, rng, planes)
    return planes


def read_image(path: Path, image_hw: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 BGR pixels; an orientation tag is ignored.

    Raises:
        DatasetError: The file is missing, truncated, not an image, or not of size `image_hw` (height, width).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read the image {path} ({error.strerror}); restore the file, or unpack the dataset again") from error
    truncated = content.startswith(_JPEG_START) and _JPEG_END not in content[-_JPEG_TAIL:]  # libjpeg would fill the rest with grey
    image = None
    if content and not truncated:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        problem = f"truncated after {len(content)} bytes" if truncated or not content else "not an image"
        raise DatasetError(f"{path} is {problem}; copy or unpack it again")
    if image.shape[:2] != tuple(image_hw):
        found, wanted = (f"{height} x {width}" for height, width in (image.shape[:2], image_hw))
        raise DatasetError(f"{path} is {found} pixels (height x width), the tables say {wanted}; restore the original")
    return image


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32 BGR, 0 to 255, with random brightness, contrast, saturation, hue and channel order. It is not clipped.

    Source: SSD (ECCV 2016), section 2.2; BEVFormer 66b65f3, PhotoMetricDistortionMultiViewImage.
    """
    if _coin_flip(rng):
        image = image + np.float32(rng.uniform(-32, 32))
    contrast_first = _coin_flip(rng)
    if contrast_first and _coin_flip(rng):
        image = image * np.float32(rng.uniform(0.5, 1.5))
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))  # hue in degrees
    if _coin_flip(rng):
        saturation *= np.float32(rng.uniform(0.5, 1.5))
    if _coin_flip(rng):
        hue += np.float32(rng.uniform(-18, 18))
        hue += np.float32(360) * (hue < 0) - np.float32(360) * (hue > 360)  # OpenCV 4.11 misreads a negative hue in its vector code
    image = cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2BGR)
    if not contrast_first and _coin_flip(rng):
        image *= np.float32(rng.uniform(0.5, 1.5))
    if _coin_flip(rng):
        channels = cv2.split(image)
        image = cv2.merge([channels[i] for i in rng.permutation(3)])
    return image


def _coin_flip(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _write_planes(image: np.ndarray, transform: ImageTransform, rng: np.random.Generator | None, planes: np.ndarray) -> None:
    """Write the network input of an (H, W, 3) uint8 BGR image into `planes` (3, *padded_hw), which is zero in the padding already.

    Scaling comes first here, as it leaves fewer pixels to distort and normalise; it is right to 1/512 of a grey level. BEVFormer distorts
    first, which gives other hues and saturations at edges only.
    """
    height, width = transform.scaled_hw
    pixels = np.multiply(image, _FIXED_POINT, dtype=np.uint16)
    if image.shape[:2] != transform.scaled_hw:
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    unit = 1 / _FIXED_POINT
    if rng is not None:
        pixels, unit = distort(pixels * np.float32(unit), rng), 1.0
    channels = cv2.split(pixels)
    channels = channels[::-1] if transform.to_rgb else channels
    for plane, channel, mean, std in zip(planes, channels, transform.mean, transform.std, strict=True):
        inside = plane[:height, :width]
        np.multiply(channel, np.float32(unit / std), out=inside)
        inside -= mean / std
