"""The detector of a vehicle that is under way: frames in order of time to boxes.

    with open_engine(Path("runs/demo/w8a8.engine")) as detector:
        while driving:
            frame = detector.prepare(images, lidar2img, can_bus, timestamp_us)
            detections = detector(frame)

It remembers what one frame leaves for the next; recurrent tensors such as the previous BEV stay on the GPU. A frame that is refused or
fails changes nothing: the next frame is treated as if one had been dropped, with the motion since the last good one. The C++ counterpart
is in examples/cpp.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.preprocess import FrameError, Preprocessor
from engine.session import Session
from qdbev import detectors
from qdbev.config import Config, from_dict
from qdbev.detector import Arrays, FrameOrderError, Memory
from qdbev.schema import Detections, Frame, Interface

Run = Callable[[Arrays], Mapping[str, np.ndarray]]
"""The deployed graph: outputs by name from inputs by name. Recurrent outputs that are missing stay where the graph runs."""

_ON_THE_GPU = np.zeros(0, np.float32)
"""Stands for a recurrent tensor that never leaves the GPU."""


class StreamingDetector:
    """A network and what it remembers of the scene. Not for several threads at once."""

    def __init__(self, run: Run, config: Config, interface: Interface) -> None:
        """
        Args:
            run: The network, in an engine, onnxruntime or PyTorch.
            config: The config in the model's seal.
            interface: Shapes of the network's inputs and outputs.
        """
        self._run = run
        self._stream = detectors.stream(config.model)
        self._interface = interface
        self._recurrent = {output for output, _ in interface.recurrent}
        self._memory: Memory = None
        self.prepare = Preprocessor(config.data, interface.inputs["images"][1:]).frame
        """Makes a frame from camera images as they arrive."""

    def __call__(self, frame: Frame) -> Detections:
        """Boxes of a frame, in the lidar frame of that moment; what the frame leaves is remembered for the next.

        Raises:
            FrameError: A tensor of the frame has the wrong shape or type or is not finite, or the network's boxes are not finite.
            FrameOrderError: The frame is not later than the last one of its scene.
            EngineError: The GPU reports a failure.
        """
        if not np.isfinite(frame.can_bus).all():
            raise FrameError(f"frame {frame.token!r}: can_bus has NaN or infinite values: {frame.can_bus}")
        try:
            inputs = self._stream.inputs(frame, self._memory)
        except FrameOrderError as error:
            raise FrameOrderError(f"{error}; StreamingDetector.reset() does that") from error
        self._check(frame, inputs)
        outputs = self._run(inputs)
        for name, value in outputs.items():
            if name not in self._recurrent and not np.isfinite(value).all():
                self.reset()  # the recurrent tensors of this frame are no better
                raise FrameError(f"frame {frame.token!r}: the network's {name} is not finite; the next frame starts without a history")
        self._memory = self._stream.remember(frame, {**dict.fromkeys(self._recurrent, _ON_THE_GPU), **outputs})
        return self._stream.decode(outputs)

    def reset(self) -> None:
        """Forget the scene: the next frame has no history. A changed `scene_token` does the same."""
        self._memory = None

    def _check(self, frame: Frame, inputs: Arrays) -> None:
        """Raise FrameError for an input of the wrong shape or type or with values that are not finite; recurrent ones are our own."""
        recurrent = {name for _, name in self._interface.recurrent}
        for name, value in inputs.items():
            if name in recurrent:
                continue
            wanted = self._interface.inputs[name]
            if value.shape != wanted:
                raise FrameError(f"frame {frame.token!r}: {name} is of shape {value.shape}, the network takes {wanted}")
            if value.dtype != np.float32:
                raise FrameError(f"frame {frame.token!r}: {name} is {value.dtype}, the network takes float32")
            if not np.isfinite(value.sum()):  # one pass and no array of flags: finite pixels have a finite sum
                wrong = int(value.size - np.isfinite(value).sum())
                raise FrameError(f"frame {frame.token!r}: {wrong} of {value.size} values of {name} are NaN or infinite")


@contextmanager
def open_engine(path: Path) -> Iterator[StreamingDetector]:
    """A detector on an engine; the GPU memory is freed at the end.

    Raises:
        ArtifactError: The engine is missing, damaged or not sealed.
        EngineError: It cannot run here.
    """
    with Session(path) as session:
        interface = session.interface
        kept = {name for pair in interface.recurrent for name in pair}
        wanted = [name for name in interface.outputs if name not in kept]

        def run(inputs: Arrays) -> Arrays:
            return session.infer({name: value for name, value in inputs.items() if name not in kept}, wanted)

        yield StreamingDetector(run, from_dict(session.seal.config), interface)
