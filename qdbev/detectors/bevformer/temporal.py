"""BEVFormer's work on the host: the previous BEV, the motion since the previous frame, and scene changes.

As upstream, the memory is used however much time has passed between two frames of a scene.
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
        """Return the inputs of the deployed graph; at the start of a scene `has_prev` and `prev_bev` are zero."""
        if memory is not None and memory.scene_token != frame.scene_token:
            memory = None
        if memory is not None and frame.timestamp_us <= memory.timestamp_us:
            raise FrameOrderError(
                f"frame {frame.token!r} at {frame.timestamp_us} us is not later than the one before it at {memory.timestamp_us} us of the "
                f"same scene {frame.scene_token!r}; give frames in order of time, or start anew with memory=None"
            )
        rows, columns = self._config.bev_hw
        return {
            "images": frame.images[None],
            "lidar2img": frame.lidar2img[None],
            "can_bus": relative_can_bus(frame.can_bus, memory.can_bus if memory else None)[None],
            "prev_bev": memory.bev if memory else np.zeros((1, rows * columns, self._config.embed_dim), np.float32),
            "has_prev": np.array([memory is not None], np.float32),
        }

    def remember(self, frame: Frame, outputs: Mapping[str, np.ndarray]) -> Memory:
        """Return the memory for the frame after `frame`."""
        return Memory(frame.scene_token, frame.timestamp_us, frame.can_bus, outputs["bev"])

    def decode(self, outputs: Mapping[str, np.ndarray]) -> Detections:
        """Decode the best `max_boxes` pairs of query and class, in the lidar frame."""
        logits, code = torch.from_numpy(outputs["cls_logits"]), torch.from_numpy(outputs["box_code"])
        return decode(logits, code, self._config.max_boxes, self._config.post_center_range)[0]
