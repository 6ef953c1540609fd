"""Frames in, boxes out: the streaming detector of a vehicle that is under way.

    with open_engine(Path("runs/demo/w8a8.engine")) as detector:
        while driving:
            frame = detector.prepare(images, lidar2img, can_bus, timestamp_us)
            found = detector(frame)

It remembers what one frame leaves for the next; the previous BEV itself stays on the GPU. A frame that is refused or fails changes
nothing: the next one is taken as if a frame had been dropped, with the motion since the last good one. The C++ counterpart is in
docs/engine.md.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from engine.preprocess import FrameError, Preparation
from engine.session import Session
from qdbev import temporal
from qdbev.config import Config, from_dict
from qdbev.nn import box_code
from qdbev.schema import Detections, Frame
from qdbev.temporal import FrameOrderError, Memory

Run = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""The deployed graph: outputs by name from inputs by name (schema.py). Without `bev` among the outputs it keeps that by itself."""

_KEPT_BY_THE_NETWORK = np.zeros(0, np.float32)


class Detector:
    """A network and what it remembers of the scene. Not for several threads at once."""

    def __init__(self, run: Run, config: Config, images_shape: tuple[int, ...]) -> None:
        """
        Args:
            run: The network, in an engine, onnxruntime or PyTorch.
            config: The one in the model's seal.
            images_shape: (N, 3, height, width) that the network takes, padded.
        """
        self._run = run
        self._model = config.model
        self._shapes = {"images": images_shape, "lidar2img": (images_shape[0], 4, 4), "can_bus": (18,)}
        self._memory: Memory | None = None
        self.prepare = Preparation(config.data, images_shape).frame
        """A frame from camera images as they arrive."""

    def __call__(self, frame: Frame) -> Detections:
        """Boxes of a frame, in the lidar frame of that moment; what it leaves is remembered for the next.

        Raises:
            FrameError: A tensor of the frame has the wrong shape or type or is not finite, or the network gave no finite box_code.
            FrameOrderError: The frame is not later than the last one of its scene.
            EngineError: The GPU reports a failure.
        """
        self._check(frame)
        try:
            inputs = temporal.deployed_inputs(frame, self._memory, self._model)
        except FrameOrderError as error:
            raise FrameOrderError(f"{error}, which is Detector.reset()") from error
        outputs = self._run(inputs)
        for name in ("cls_logits", "box_code"):
            if not np.isfinite(outputs[name]).all():
                self.reset()  # the BEV of this frame is no better
                raise FrameError(f"frame {frame.token!r}: the network's {name} is not finite; the next frame starts without a history")
        self._memory = temporal.remember(frame, outputs.get("bev", _KEPT_BY_THE_NETWORK))
        return box_code.decode(torch.from_numpy(outputs["cls_logits"]), torch.from_numpy(outputs["box_code"]), self._model)[0]

    def reset(self) -> None:
        """Forget the scene: the next frame has no history. A changed `scene_token` does the same."""
        self._memory = None

    def _check(self, frame: Frame) -> None:
        for name, wanted in self._shapes.items():
            value = getattr(frame, name)
            if value.shape != wanted:
                raise FrameError(f"frame {frame.token!r}: {name} is of shape {value.shape}, the network takes {wanted}")
            if name != "can_bus" and value.dtype != np.float32:
                raise FrameError(f"frame {frame.token!r}: {name} is {value.dtype}, the network takes float32")
            if not np.isfinite(value.sum()):  # one pass and no array of flags; finite pixels have a finite sum
                wrong = int(value.size - np.isfinite(value).sum())
                raise FrameError(f"frame {frame.token!r}: {wrong} of {value.size} values of {name} are NaN or infinite")


@contextmanager
def open_engine(path: Path) -> Iterator[Detector]:
    """A detector on an engine, whose memory is freed in the end.

    Raises:
        ArtifactError: The engine is missing, damaged or not sealed.
        EngineError: It cannot run here.
    """
    with Session(path) as session:

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            del inputs["prev_bev"]  # it lies on the GPU
            return session.infer(inputs, ("cls_logits", "box_code"))

        yield Detector(run, from_dict(session.seal.config), session.shapes["images"][1:])
