"""Frames become the batches the network is called with. B samples; q frames in each of their queues."""

from collections.abc import Sequence

import numpy as np
import torch

from qdbev.can_bus import relative_can_bus
from qdbev.schema import Batch, Frame


def queue_batch(queues: list[list[Frame]]) -> tuple[list[Batch], Batch]:
    """History, oldest first (q - 1 batches), and the current frames of B queues of equal length.

    can_bus is relative to the frame before it in the same queue; has_prev is zero for the first frame and where the scene changes.
    """
    relative = [_relative(queue) for queue in queues]
    steps = []
    for frames, motions in zip(zip(*queues, strict=True), zip(*relative, strict=True), strict=True):
        steps.append(frame_batch(frames, [can_bus for can_bus, _ in motions], [has_prev for _, has_prev in motions]))
    return steps[:-1], steps[-1]


def frame_batch(frames: Sequence[Frame], can_bus: Sequence[np.ndarray], has_prev: Sequence[bool]) -> Batch:
    """One batch of B frames with their relative can_bus (18,) and whether a previous BEV counts; has_prev becomes (B,) float32."""
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
    """can_bus (18,) relative to the previous frame of the queue, and whether that is of the same scene."""
    motions = []
    for previous, frame in zip([None, *queue], queue):  # noqa: B905 (the last frame is nobody's previous)
        continues = previous is not None and previous.scene_token == frame.scene_token
        motions.append((relative_can_bus(frame.can_bus, previous.can_bus if continues else None), continues))
    return motions
