"""Predicts class logits and box codes from decoder states; every decoder layer has branches of its own.

Source: bevformer dense_heads/bevformer_head.py at 66b65f3.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qdbev.schema import CODE_SIZE

_FOREGROUND_PRIOR = 0.01
"""Probability of each class that the freshly initialised head predicts."""


class Decoded(NamedTuple):
    """Result of one decoder layer.

    state: (B, Q, C) state of the object queries.
    regression: (B, Q, 10) output of this layer's box branch.
    reference: (B, Q, 3) logits of the (x, y, z) that entered the layer, to which the regression adds.
    """

    state: Tensor
    regression: Tensor
    reference: Tensor


class SetHead(nn.Module):
    """Classification branches and regression branches, one of each for every decoder layer."""

    def __init__(self, embed_dim: int, num_classes: int, num_layers: int, pc_range: tuple[float, ...]) -> None:
        super().__init__()
        self.pc_range = pc_range
        C = embed_dim
        self.cls_branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(C, C), nn.LayerNorm(C), nn.ReLU(), nn.Linear(C, C), nn.LayerNorm(C), nn.ReLU(), nn.Linear(C, num_classes)
            )
            for _ in range(num_layers)
        )
        self.reg_branches = nn.ModuleList(
            nn.Sequential(nn.Linear(C, C), nn.ReLU(), nn.Linear(C, C), nn.ReLU(), nn.Linear(C, CODE_SIZE)) for _ in range(num_layers)
        )
        for branch in self.cls_branches:
            nn.init.constant_(branch[-1].bias, -math.log((1 - _FOREGROUND_PRIOR) / _FOREGROUND_PRIOR))

    def forward(self, decoded: list[Decoded]) -> tuple[Tensor, Tensor]:
        """Return (layers, B, Q, classes) logits and (layers, B, Q, 10) box codes in metres, lidar frame."""
        logits = [branch(layer.state) for branch, layer in zip(self.cls_branches, decoded, strict=True)]
        return torch.stack(logits), torch.stack([self._box_code(layer) for layer in decoded])

    def _box_code(self, layer: Decoded) -> Tensor:
        x_min, y_min, z_min, x_max, y_max, z_max = self.pc_range
        center = (layer.regression[..., (0, 1, 4)] + layer.reference).sigmoid()
        x = center[..., 0:1] * (x_max - x_min) + x_min
        y = center[..., 1:2] * (y_max - y_min) + y_min
        z = center[..., 2:3] * (z_max - z_min) + z_min
        return torch.cat((x, y, layer.regression[..., 2:4], z, layer.regression[..., 5:]), -1)
