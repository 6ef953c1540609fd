"""Converts boxes to the ten numbers that a head predicts (the box code) and back.

A box is (x, y, z, w, l, h, yaw, vx, vy): gravity centre, metres, radians, metres a second, lidar frame, yaw in the SECOND
convention (yaw = -yaw_nuscenes - pi/2). Its code is (cx, cy, log w, log l, cz, log h, sin yaw, cos yaw, vx, vy).

Source: bevformer core/bbox/util.py and coders/nms_free_coder.py at 66b65f3.
"""

import torch
from torch import Tensor

from qdbev.schema import Detections


def encode(boxes: Tensor) -> Tensor:
    """Convert (..., 9) boxes to (..., 10) codes. Sizes of zero become -inf, which the detection loss leaves out."""
    x, y, z, w, l, h, yaw, vx, vy = boxes.unbind(-1)  # noqa: E741
    return torch.stack((x, y, w.log(), l.log(), z, h.log(), yaw.sin(), yaw.cos(), vx, vy), -1)


def from_code(code: Tensor) -> Tensor:
    """Convert (..., 10) codes to (..., 9) boxes."""
    x, y, log_w, log_l, z, log_h, sin, cos, vx, vy = code.unbind(-1)
    return torch.stack((x, y, z, log_w.exp(), log_l.exp(), log_h.exp(), torch.atan2(sin, cos), vx, vy), -1)


def decode(cls_logits: Tensor, box_code: Tensor, max_boxes: int, post_center_range: tuple[float, ...]) -> list[Detections]:
    """Decode the detections of each sample: the best `max_boxes` pairs of query and class, without suppression or threshold.

    Args:
        cls_logits: (B, Q, classes) of the last decoder layer.
        box_code: (B, Q, 10) of the same layer.
        post_center_range: x, y, z minimum then maximum in metres, lidar frame; boxes with a centre outside are dropped.
    """
    return [
        _decode_sample(logits, code, max_boxes, post_center_range)
        for logits, code in zip(cls_logits.float(), box_code.float(), strict=True)
    ]


def _decode_sample(logits: Tensor, code: Tensor, max_boxes: int, post_center_range: tuple[float, ...]) -> Detections:
    num_query, num_classes = logits.shape
    scores, index = logits.sigmoid().flatten().topk(min(max_boxes, num_query * num_classes))
    boxes = from_code(code[index // num_classes])
    low = boxes.new_tensor(post_center_range[:3])
    high = boxes.new_tensor(post_center_range[3:])
    keep = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(-1)
    numpy = [t[keep].cpu().numpy() for t in (boxes, scores, index % num_classes)]
    return Detections(*numpy)
