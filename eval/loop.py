"""The evaluation loop: frames of a split in order, with what each leaves for the next.

This is the one place where time passes during evaluation; detectors remember nothing.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from eval.open_model import Detector
from qdbev import temporal
from qdbev.nn import box_code
from qdbev.schema import Detections, Frame
from qdbev.temporal import Memory


class Frames(Protocol):
    """What the loop asks of a dataset: frames in order of time."""

    def __len__(self) -> int: ...

    def frame(self, index: int) -> Frame:
        """Key frame `index`."""
        ...


class Step(NamedTuple):
    """One evaluated frame: its index, what was seen, what was found (lidar frame), and the seconds the model took."""

    index: int
    frame: Frame
    detections: Detections
    model_seconds: float


def steps(detector: Detector, dataset: Frames) -> Iterator[Step]:
    """Evaluate every frame in order; the memory starts anew with every scene.

    Raises:
        FrameOrderError: Frames of a scene do not come in order of time.
    """
    model = detector.config.model
    memory: Memory | None = None
    for index in range(len(dataset)):
        frame = dataset.frame(index)
        inputs = temporal.deployed_inputs(frame, memory, model)
        started = time.perf_counter()
        outputs = detector(inputs)
        seconds = time.perf_counter() - started
        memory = temporal.remember(frame, outputs["bev"])
        found = box_code.decode(torch.from_numpy(outputs["cls_logits"]), torch.from_numpy(outputs["box_code"]), model)[0]
        yield Step(index, frame, found, seconds)
