"""The data that passes between rooms.

B batch, N cameras, H W padded image size, C embedding width, Q object queries. Boxes and grids are in the lidar frame
(x right, y forward, z up; metres, radians, seconds) of the key frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CLASSES = ("car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone")
"""Label ids, in the order of the official checkpoints."""

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
"""Camera order of images, lidar2img and the learned camera embeddings."""

CODE_SIZE = 10
"""Numbers of a box code, see qdbev/nn/box_code.py."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Names and shapes of a detector's deployed graph, batch 1; it is part of the seals of ONNX files and engines.

    All tensors are float32. Whatever an engine must know about a detector is here, so that `engine/` names none.
    """

    inputs: dict[str, tuple[int, ...]]
    """Shape of each input, in the order of the graph. Every detector has `images` (1, cameras, 3, height, width)."""
    outputs: dict[str, tuple[int, ...]]
    """Shape of each output, in the order of the graph."""
    recurrent: tuple[tuple[str, str], ...] = ()
    """Pairs (output, input): the output of one frame is the input of the next frame of the scene."""
    geometry: tuple[str, ...] = ()
    """Inputs with calibration and motion. Tensors that depend on these alone are never quantized and stay float32."""
    coordinates: tuple[str, ...] = ()
    """Outputs in metres and the like, which stay float32 up to the matrix product that produces them."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One key frame as the data room reads it, without history.

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
    """One step of B samples on one device.

    images, lidar2img, boxes and labels as in `Frame`, with a batch axis or one entry for each sample; `can_bus` (B, 18) is relative to the
    previous frame (qdbev/can_bus.py); `has_prev` (B,) is one where a sample has a previous frame, else zero.
    """

    images: Tensor
    lidar2img: Tensor
    can_bus: Tensor
    has_prev: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    tokens: list[str]


class Detections(NamedTuple):
    """Decoded boxes of one sample: boxes (K, 9) as in `Frame.boxes`, scores (K,) falling, labels (K,)."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
