"""From camera files to the network's input: decode, distort, normalise, scale, pad.

Numbers follow BEVFormer 66b65f3 (datasets/pipelines/transform_3d.py): normalised first, then scaled (bilinear, half-pixel centres, no
antialiasing), then padded with zeros at the bottom and right. H W image size before, in pixels; images are BGR as OpenCV reads them.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from qdbev.data.image_transform import ImageTransform
from qdbev.data.infos import DatasetError

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_TAIL = 64
"""Bytes at the end of a whole JPEG file among which its end marker lies; some writers pad."""
_FIXED_POINT = 256


def load_images(paths: Sequence[Path], transform: ImageTransform, rng: np.random.Generator | None = None) -> np.ndarray:
    """(N, 3, *padded_hw) float32 network input from N files; each distorted on its own where `rng` is given.

    Raises:
        DatasetError: A file is missing, cut short, no image, or of another size than `transform.image_hw`.
    """
    out = np.zeros((len(paths), 3, *transform.padded_hw), dtype=np.float32)
    for path, planes in zip(paths, out, strict=True):
        _write_planes(read_image(path, transform.image_hw), transform, rng, planes)
    return out


def prepare_image(image: np.ndarray, transform: ImageTransform, rng: np.random.Generator | None = None) -> np.ndarray:
    """(3, *padded_hw) float32 network input from one (H, W, 3) uint8 BGR image; distorted where `rng` is given."""
    planes = np.zeros((3, *transform.padded_hw), dtype=np.float32)
    _write_planes(image, transform, rng, planes)
    return planes


def read_image(path: Path, image_hw: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 BGR pixels as stored; an orientation tag is not obeyed.

    Raises:
        DatasetError: The file is missing, cut short, no image, or not of size `image_hw`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read the image {path} ({error.strerror}); bring the file back, or unpack the dataset again") from error
    cut_short = content.startswith(_JPEG_START) and _JPEG_END not in content[-_JPEG_TAIL:]  # which libjpeg fills with grey
    image = None
    if content and not cut_short:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        what = f"cut short at {len(content)} bytes" if cut_short or not content else "no image"
        raise DatasetError(f"{path} is {what}; copy or unpack it again")
    if image.shape[:2] != tuple(image_hw):
        found, wanted = (f"{height} x {width}" for height, width in (image.shape[:2], image_hw))
        raise DatasetError(f"{path} is {found} pixels (height x width), the tables say {wanted}; bring the original back")
    return image


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32 BGR, 0 to 255, with random brightness, contrast, saturation, hue and channel order; not clipped.

    Source: SSD (ECCV 2016), section 2.2; BEVFormer 66b65f3, PhotoMetricDistortionMultiViewImage.
    """
    if _heads(rng):
        image = image + np.float32(rng.uniform(-32, 32))
    contrast_first = _heads(rng)
    if contrast_first and _heads(rng):
        image = image * np.float32(rng.uniform(0.5, 1.5))
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))  # hue in degrees
    if _heads(rng):
        saturation *= np.float32(rng.uniform(0.5, 1.5))
    if _heads(rng):
        hue += np.float32(rng.uniform(-18, 18))
        hue += np.float32(360) * (hue < 0) - np.float32(360) * (hue > 360)  # OpenCV 4.11 misreads a negative hue in its vector code
    image = cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2BGR)
    if not contrast_first and _heads(rng):
        image *= np.float32(rng.uniform(0.5, 1.5))
    if _heads(rng):
        channels = cv2.split(image)
        image = cv2.merge([channels[i] for i in rng.permutation(3)])
    return image


def _heads(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _write_planes(image: np.ndarray, transform: ImageTransform, rng: np.random.Generator | None, planes: np.ndarray) -> None:
    """Fill `planes` (3, *padded_hw), whose padding is zero already, from an (H, W, 3) uint8 BGR image.

    Scaling is linear, so it may come before the normalisation, on fewer pixels; only its rounding would show. Eight fractional bits
    of fixed point make it exact for scales of 1/2, 4/5 and 1 and right to 1/512 of a grey level for others. Distortion comes after it
    for the same reason; upstream distorts first, which differs only in hue and saturation at edges.
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
