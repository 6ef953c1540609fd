"""What a frame costs on the host, around the engine: camera images to the network's input, and its outputs to box_code."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.preprocess import Preparation
from qdbev.config import Config
from qdbev.nn import box_code

_RUNS = 100
_WARM_UP = 5


def measure(config: Config, images_shape: tuple[int, ...]) -> dict[str, Any]:
    """Times in milliseconds of `_RUNS` frames of noise.

    Args:
        images_shape: (N, 3, height, width) of the network's input, padded. The camera images are the largest that it takes.

    Returns:
        "before" and "after", a list each, and "camera_hw".
    """
    rng, model = np.random.default_rng(0), config.model
    preparation = Preparation(config.data, images_shape)
    height, width = preparation.largest_hw
    images = rng.integers(0, 256, (images_shape[0], height, width, 3), dtype=np.uint8)
    lidar2img, can_bus = np.tile(np.eye(4), (images_shape[0], 1, 1)), np.zeros(18)
    logits = torch.from_numpy(rng.standard_normal((1, model.num_query, model.num_classes), dtype=np.float32))
    code = torch.from_numpy(rng.standard_normal((1, model.num_query, 10), dtype=np.float32))
    return {
        "before": _times(lambda: preparation.frame(images, lidar2img, can_bus, 0)),
        "after": _times(lambda: box_code.decode(logits, code, model)),
        "camera_hw": [height, width],
    }


def _times(work: Callable[[], object]) -> list[float]:
    """Milliseconds of each run after the first few."""
    found = []
    for _ in range(_WARM_UP + _RUNS):
        started = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - started))
    return found[_WARM_UP:]
