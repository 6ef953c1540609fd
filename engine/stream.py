"""A detector for live use: it takes frames in order of time and returns boxes.

    with open_engine(Path("runs/demo/w8a8.engine")) as detector:
        while driving:
            frame = detector.prepare(images, lidar2img, can_bus, timestamp_us)
            detections = detector(frame)

Recurrent tensors such as the previous BEV stay on the GPU. A frame that is refused or fails changes nothing: the next one is treated as
after a dropped frame, with the vehicle's motion since the last good frame. The C++ counterpart is in examples/cpp.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.open_session import open_session
from engine.preprocess import FrameError, Preprocessor
from qdbev import detectors
from qdbev.config import Config, from_dict
from qdbev.detector import Arrays, FrameOrderError, Memory
from qdbev.schema import Detections, Frame, Interface

Run = Callable[[Arrays], Mapping[str, np.ndarray]]
"""A function that runs the deployed graph: outputs by name from inputs by name. It may keep recurrent outputs and leave them out."""

_ON_THE_GPU = np.zeros(0, np.float32)
"""Placeholder for a recurrent tensor that never leaves the GPU."""


class StreamingDetector:
    """A network with the memory of the current scene. Use it from one thread at a time."""

    def __init__(self, run: Run, config: Config, interface: Interface) -> None:
        """Make a detector from a function that runs the network, and the config and interface in the model's seal."""
        self._run = run
        self._stream = detectors.stream(config.model)
        fields = [field.name for field in dataclasses.fields(Frame)]
        self._shapes = {name: shape[1:] for name, shape in interface.inputs.items() if name in fields}
        self._recurrent = {output for output, _ in interface.recurrent}
        self._memory: Memory = None
        self.prepare = Preprocessor(config.data, interface.inputs["images"][1:]).frame
        """Makes a frame from camera images; see `Preprocessor.frame`."""

    def __call__(self, frame: Frame) -> Detections:
        """Detect the boxes of a frame, in its lidar frame, and keep the memory for the next frame.

        Raises:
            FrameError: A tensor of the frame has the wrong shape or type or is not finite, or the network's boxes are not finite.
            FrameOrderError: The frame is not later than the last one of its scene.
            EngineError: The GPU reports a failure.
        """
        self._check(frame)
        try:
            inputs = self._stream.inputs(frame, self._memory)
        except FrameOrderError as error:
            raise FrameOrderError(f"{error}; StreamingDetector.reset() does that") from error
        for name, value in inputs.items():
            if value.dtype != np.float32:
                raise FrameError(f"frame {frame.token!r}: {name} is {value.dtype}, the network takes float32")
        outputs = self._run(inputs)
        for name, value in outputs.items():
            if name not in self._recurrent and not np.isfinite(value).all():
                self.reset()  # the recurrent tensors of this frame are not finite either
                raise FrameError(f"frame {frame.token!r}: the network's {name} is not finite; the next frame starts without a history")
        self._memory = self._stream.remember(frame, {**dict.fromkeys(self._recurrent, _ON_THE_GPU), **outputs})
        return self._stream.decode(outputs)

    def reset(self) -> None:
        """Forget the scene, so that the next frame has no history. A frame with another `scene_token` has the same effect."""
        self._memory = None

    def _check(self, frame: Frame) -> None:
        """Raise FrameError for a tensor of the frame that has the wrong shape or is not finite."""
        for name, wanted in self._shapes.items():
            found = getattr(frame, name).shape
            if found != wanted:
                raise FrameError(f"frame {frame.token!r}: {name} is of shape {found}, the network takes {wanted}")
        for name in dict.fromkeys(("can_bus", *self._shapes)):  # the motion is kept for the next frame whether the network takes it or not
            value = getattr(frame, name)
            if not np.isfinite(value.sum()):  # one pass without an array of flags: the sum of finite pixels is finite
                wrong = int(value.size - np.isfinite(value).sum())
                raise FrameError(f"frame {frame.token!r}: {wrong} of {value.size} values of {name} are NaN or infinite")


@contextmanager
def open_engine(path: Path, threads: int | None = None) -> Iterator[StreamingDetector]:
    """Open an engine as a detector; its memory is freed when the `with` block ends. Arguments and errors are those of `open_session`."""
    with open_session(path, threads) as session:
        interface = session.interface
        kept = {name for pair in interface.recurrent for name in pair}
        wanted = [name for name in interface.outputs if name not in kept]

        def run(inputs: Arrays) -> Arrays:
            return session.infer({name: value for name, value in inputs.items() if name not in kept}, wanted)

        yield StreamingDetector(run, from_dict(session.seal.config), interface)
