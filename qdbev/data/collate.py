"""Collates frames into the batches that the network is called with. B is the batch size, q the number of frames in a queue."""

from collections.abc import Sequence

import numpy as np
import torch

from qdbev.can_bus import relative_can_bus
from qdbev.schema import Batch, Frame


def queue_batch(queues: list[list[Frame]]) -> tuple[list[Batch], Batch]:
    """Collates B queues of equal length into q - 1 batches of earlier frames, oldest first, and the batch of the current frames.

    can_bus becomes relative to the previous frame of the same queue. has_prev is zero for the first frame of a queue and where the scene
    changes.
    """
    relative = [_relative(queue) for queue in queues]
    steps = []
    for frames, motions in zip(zip(*queues, strict=True), zip(*relative, strict=True), strict=True):
        steps.append(frame_batch(frames, [can_bus for can_bus, _ in motions], [has_prev for _, has_prev in motions]))
    return steps[:-1], steps[-1]


def frame_batch(frames: Sequence[Frame], can_bus: Sequence[np.ndarray], has_prev: Sequence[bool]) -> Batch:
    """One batch of B frames; `can_bus` (18,) of each is relative to its previous frame, `has_prev` tells whether that may be used."""
    return Batch(
        images=torch.from_numpy(np.stack([frame.images for frame in frames])),
        lidar2img=torch.from_numpy(np.stack([frame.lidar2img for frame in frames])),
        can_bus=torch.from_numpy(np.stack(can_bus)),
        has_prev=torch.tensor(has_prev, dtype=torch.float32),
        boxes=[torch.from_numpy(frame.boxes) for frame in frames],
        labels=[torch.from_numpy(frame.labels) for frame in frames],
        tokens=[frame.token for frame in frames],
    )


def _relative(queue: list[Frame]) -> list[tuple[np.ndarray, bool]]:
    """For each frame, can_bus (18,) relative to the previous frame of the queue, and whether that frame is of the same scene."""
    motions = []
    for previous, frame in zip([None, *queue], queue):  # noqa: B905 (one longer: no frame follows the last one)
        continues = previous is not None and previous.scene_token == frame.scene_token
        motions.append((relative_can_bus(frame.can_bus, previous.can_bus if continues else None), continues))
    return motions
