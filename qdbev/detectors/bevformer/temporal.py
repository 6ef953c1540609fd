"""BEVFormer's work on the host: the previous BEV, the motion since the previous frame, and scene changes.

The functions have no state: the caller passes the memory of the previous frame. As upstream, the memory is used however much time has
passed between two frames of a scene.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from qdbev.can_bus import relative_can_bus
from qdbev.detector import Arrays, FrameOrderError
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.nn.box_code import decode
from qdbev.schema import Detections, Frame


class Memory(NamedTuple):
    """The values of one frame that the next one needs: scene, time, absolute can_bus (18,) and BEV features (1, BEV cells, C)."""

    scene_token: str
    timestamp_us: int
    can_bus: np.ndarray
    bev: np.ndarray


class BEVFormerStream:
    """The `detector.FrameStream` of BEVFormer."""

    def __init__(self, config: BEVFormerConfig) -> None:
        self._config = config

    def inputs(self, frame: Frame, memory: Memory | None) -> Arrays:
        """Return the inputs of the deployed graph; at the start of a scene `has_prev` and `prev_bev` are zero.

        Raises:
            FrameOrderError: The memory is of the same scene but not of an earlier frame.
        """
        can_bus, prev_bev = previous(frame, memory)
        rows, columns = self._config.bev_hw
        return {
            "images": frame.images[None],
            "lidar2img": frame.lidar2img[None],
            "can_bus": can_bus[None],
            "prev_bev": np.zeros((1, rows * columns, self._config.embed_dim), np.float32) if prev_bev is None else prev_bev,
            "has_prev": np.array([prev_bev is not None], np.float32),
        }

    def remember(self, frame: Frame, outputs: Mapping[str, np.ndarray]) -> Memory:
        """Return the memory for the frame after `frame`."""
        return Memory(frame.scene_token, frame.timestamp_us, frame.can_bus, outputs["bev"])

    def decode(self, outputs: Mapping[str, np.ndarray]) -> Detections:
        """Decode the best `max_boxes` pairs of query and class, in the lidar frame."""
        config = self._config
        logits, code = torch.from_numpy(outputs["cls_logits"]), torch.from_numpy(outputs["box_code"])
        return decode(logits, code, config.max_boxes, config.post_center_range)[0]


def previous(frame: Frame, memory: Memory | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the relative can_bus (18,), and the previous BEV of the same scene or None at the start of a scene.

    Raises:
        FrameOrderError: The memory is of the same scene but not of an earlier frame.
    """
    if memory is None or memory.scene_token != frame.scene_token:
        return relative_can_bus(frame.can_bus, None), None
    if frame.timestamp_us <= memory.timestamp_us:
        raise FrameOrderError(
            f"frame {frame.token!r} at {frame.timestamp_us} us is not later than the one before it at {memory.timestamp_us} us of the same "
            f"scene {frame.scene_token!r}; give frames in order of time, or start anew with memory=None"
        )
    return relative_can_bus(frame.can_bus, memory.can_bus), memory.bev
