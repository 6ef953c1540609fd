"""Inputs of an ordinary frame for measurements: the cameras of nuScenes' vehicle, which drives and turns, noise as pixels, and a history.

The time of a frame depends on its inputs: an operator may skip the cameras that do not see a place, so matrices of zeros or noise would
change the amount of work.
"""

import numpy as np

from qdbev import detectors
from qdbev.config import Config
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Arrays
from qdbev.schema import Interface


def typical_inputs(config: Config, interface: Interface) -> Arrays:
    """Inputs of the second frame of a scene by name, the same at every call. The first frame's outputs are noise."""
    _, num_cameras, _, height, width = interface.inputs["images"]
    first, second = noise_frames(config.data, num_cameras, (height, width))
    stream, rng = detectors.stream(config.model), np.random.default_rng(0)
    outputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in interface.outputs.items()}
    return stream.inputs(second, stream.remember(first, outputs))
