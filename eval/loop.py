"""The evaluation loop: runs a model over the frames of a split in order of time and decodes the boxes of each frame."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from eval.open_model import OpenModel
from qdbev.data.dataset import FrameDataset
from qdbev.detector import Arrays, run_stream
from qdbev.schema import Detections, Frame


class EvaluatedFrame(NamedTuple):
    """One evaluated frame: its index, the frame, the boxes found in it (lidar frame), and the seconds the model took."""

    index: int
    frame: Frame
    detections: Detections
    model_seconds: float


@dataclass(frozen=True)
class FramesInOrder:
    """The first `count` frames of a dataset, or all of them; each iteration reads them again."""

    dataset: FrameDataset
    count: int | None = None

    def __iter__(self) -> Iterator[Frame]:
        return map(self.dataset.frame, range(len(self.dataset))[: self.count])


def evaluate_frames(model: OpenModel, dataset: FrameDataset) -> Iterator[EvaluatedFrame]:
    """Evaluate every frame in order; the memory starts anew with every scene.

    Raises:
        FrameOrderError: Frames of a scene do not come in order of time.
    """
    seconds = 0.0

    def timed(inputs: Arrays) -> Arrays:
        nonlocal seconds
        started = time.perf_counter()
        outputs = model.run(inputs)
        seconds = time.perf_counter() - started
        return outputs

    stream = model.stream
    for index, step in enumerate(run_stream(stream, timed, FramesInOrder(dataset))):
        yield EvaluatedFrame(index, step.frame, stream.decode(step.outputs), seconds)
