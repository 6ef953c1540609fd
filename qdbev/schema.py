"""The tensors that cross rooms, and the names of the deployed graph's inputs and outputs.

B batch, N cameras, H W padded image size, C embedding width, Q object queries. Boxes and grids live in the lidar frame
(x right, y forward, z up; metres, radians, seconds) of the key frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
"""Label ids, in the order of the official checkpoints."""

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
"""Camera order of images, lidar2img and the learned camera embeddings."""

OP_DOMAIN = "qdbev"
"""Same as `qdbev.ops.contract.DOMAIN`; only plugins/tensorrt_ops.py still reads it here."""

INPUTS = ("images", "lidar2img", "can_bus", "prev_bev", "has_prev")
"""Deployed inputs: (1, N, 3, H, W), (1, N, 4, 4), (1, 18), (1, BEV cells, C), (1,); all float32."""
OUTPUTS = ("cls_logits", "box_code", "bev")
"""Deployed outputs: (1, Q, classes) and (1, Q, 10) of the last decoder layer, (1, BEV cells, C); all float32."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Names and shapes of a detector's deployed graph, batch 1; it travels in the seals of ONNX files and engines.

    All tensors are float32. Whatever an engine must know about a detector is here, so that `engine/` names none.
    """

    inputs: dict[str, tuple[int, ...]]
    """Shape of each input, in the order of the graph."""
    outputs: dict[str, tuple[int, ...]]
    """Shape of each output, in the order of the graph."""
    recurrent: tuple[tuple[str, str], ...] = ()
    """Pairs (output, input): the output of one frame is the input of the next frame of the scene."""
    geometry: tuple[str, ...] = ()
    """Inputs that hold calibration and motion: what depends on these alone is never quantized and stays float32."""
    coordinates: tuple[str, ...] = ()
    """Outputs in metres and the like, which stay float32 up to the matrix product that produces them."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One key frame as the data room gives it, before anything temporal.

    images (N, 3, H, W) float32, normalised and padded; lidar2img (N, 4, 4) float32 from lidar to padded pixels; can_bus (18,)
    float64 with absolute position [0:3] and yaw [16] rad, [17] deg in the global frame; boxes (G, 9) float32 gravity centre,
    w, l, h, yaw (SECOND convention), vx, vy; labels (G,) int64. boxes and labels are empty where annotations are withheld.
    """

    token: str
    scene_token: str
    timestamp_us: int
    images: np.ndarray
    lidar2img: np.ndarray
    can_bus: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


class Batch(NamedTuple):
    """One step of B samples on one device. `can_bus` (B, 18) is relative to the previous frame (temporal.py)."""

    images: Tensor
    lidar2img: Tensor
    can_bus: Tensor
    has_prev: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    tokens: list[str]


class BevOutput(NamedTuple):
    """What the network gives; distillation, losses and decoding read these fields and nothing else.

    image_features: per level (B, N, C, h, w), the neck's output.
    bev: (B, BEV cells, C), row-major with y as the row; the next frame's `prev_bev`.
    cls_logits: (decoder layers, B, Q, classes).
    box_code: (decoder layers, B, Q, 10): cx, cy, log w, log l, cz, log h, sin yaw, cos yaw, vx, vy; metres, lidar frame.
    """

    image_features: tuple[Tensor, ...]
    bev: Tensor
    cls_logits: Tensor
    box_code: Tensor


class Detections(NamedTuple):
    """Decoded boxes of one sample: boxes (K, 9) as in `Frame.boxes`, scores (K,) falling, labels (K,)."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
