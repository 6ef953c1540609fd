"""Rotation of a BEV map by the change of the ego's yaw, with nearest-cell sampling around a fixed centre.

Source: torchvision 0.10.1 `rotate`, as BEVFormer calls it (bevformer modules/transformer.py at 66b65f3); here a gather of rows, for ONNX.
"""

import torch
from torch import Tensor


def rotate_bev(bev: Tensor, angle_deg: Tensor, bev_hw: tuple[int, int], center: tuple[float, float]) -> Tensor:
    """Rotate the BEV features of an earlier frame into the orientation of the ego now.

    Args:
        bev: (B, H * W, C), row-major.
        angle_deg: (B,) degrees by which the ego has turned counter-clockwise since `bev` was computed.
        bev_hw: Height H and width W of the map in cells.
        center: Centre of rotation (x, y) in cells; may be outside the map.

    Returns:
        (B, H * W, C); cells whose source is outside the map are zero.
    """
    H, W = bev_hw
    B = bev.shape[0]
    y = torch.arange(H, dtype=torch.float32, device=bev.device) - (center[1] - 0.5)
    x = torch.arange(W, dtype=torch.float32, device=bev.device) - (center[0] - 0.5)
    grid_y, grid_x = (g.reshape(1, -1) for g in torch.meshgrid(y, x, indexing="ij"))  # (1, H*W)
    turn = torch.deg2rad(angle_deg.float())[:, None]
    cos, sin = turn.cos(), turn.sin()
    column = torch.round(cos * grid_x - sin * grid_y + (center[0] - 0.5))  # (B, H*W)
    row = torch.round(sin * grid_x + cos * grid_y + (center[1] - 0.5))
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    first = torch.arange(B, device=bev.device)[:, None] * (H * W)
    source = first + (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).long()
    rotated = bev.reshape(B * H * W, -1)[source.flatten()].view_as(bev)
    return rotated * inside[..., None].to(bev.dtype)
