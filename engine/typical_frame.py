"""Inputs of an ordinary frame, for measuring: the rig of nuScenes' vehicle, a car that drives and turns, noise as pixels, a history.

The time of a frame depends on them: spatial attention skips the cameras that do not see a BEV cell, so matrices of zeros or noise would
give it a different amount of work.
"""

import numpy as np

from qdbev import detectors
from qdbev.config import Config
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Arrays
from qdbev.schema import Interface


def typical_inputs(config: Config, interface: Interface) -> Arrays:
    """Inputs of the second frame of a scene, by name; the same at every call."""
    _, num_cameras, _, height, width = interface.inputs["images"]
    first, second = noise_frames(config.data, num_cameras, (height, width))
    stream, rng = detectors.stream(config.model), np.random.default_rng(0)
    outputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in interface.outputs.items()}
    return stream.inputs(second, stream.remember(first, outputs))
