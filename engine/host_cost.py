"""Measures the work on the host around the engine: from camera images to the network's inputs, and from its outputs to boxes."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.preprocess import Preprocessor
from qdbev import detectors
from qdbev.config import Config
from qdbev.schema import Interface

_RUNS = 100
"""Measured runs of each part."""
_WARM_UP = 5
"""Runs before the measured ones."""


def measure(config: Config, interface: Interface) -> dict[str, Any]:
    """Measure frames of noise; the camera images are the largest that fit the network.

    Returns:
        "before" and "after": milliseconds of each run. "camera_hw": height and width of the camera images in pixels.
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
    """Milliseconds of each run after the warm-up."""
    found = []
    for _ in range(_WARM_UP + _RUNS):
        started = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - started))
    return found[_WARM_UP:]
