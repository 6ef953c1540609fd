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
    steps = []
    last: Sequence[Frame | None] = [None] * len(queues)
    for frames in zip(*queues, strict=True):
        previous = [old if old and old.scene_token == frame.scene_token else None for frame, old in zip(frames, last, strict=True)]
        can_bus = [relative_can_bus(frame.can_bus, old.can_bus if old else None) for frame, old in zip(frames, previous, strict=True)]
        steps.append(frame_batch(frames, can_bus, [old is not None for old in previous]))
        last = frames
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
