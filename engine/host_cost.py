"""The time of a frame on the host, around the engine: camera images to the network's input, and its outputs to boxes."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.preprocess import Preprocessor
from qdbev import detectors
from qdbev.config import Config
from qdbev.schema import Interface

_RUNS = 100
_WARM_UP = 5


def measure(config: Config, interface: Interface) -> dict[str, Any]:
    """Times in milliseconds of `_RUNS` frames of noise. The camera images are the largest that the network takes.

    Returns:
        "before" and "after", a list of times each, and "camera_hw", the size of the images in pixels.
    """
    rng, stream = np.random.default_rng(0), detectors.stream(config.model)
    num_cameras = interface.inputs["images"][1]
    preprocessor = Preprocessor(config.data, interface.inputs["images"][1:])
    height, width = preprocessor.largest_hw
    images = rng.integers(0, 256, (num_cameras, height, width, 3), dtype=np.uint8)
    lidar2img, can_bus = np.tile(np.eye(4), (num_cameras, 1, 1)), np.zeros(18)
    outputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in interface.outputs.items()}
    return {
        "before": _times(lambda: preprocessor.frame(images, lidar2img, can_bus, 0)),
        "after": _times(lambda: stream.decode(outputs)),
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
