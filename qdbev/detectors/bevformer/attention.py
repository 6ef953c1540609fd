"""The deformable attention blocks of BEVFormer. Each adds its input to its result; the caller normalises.

Source: BEVFormer (arXiv:2203.17270), equations 2-5; bevformer modules/{temporal_self_attention,spatial_cross_attention,decoder}.py
at 66b65f3. The biases of sampling offsets are initialised to rays, one direction for each head (Deformable DETR).

B batch, N cameras, C width, M heads, L levels, P points, K BEV cells, Q queries.
"""

import math

import torch
from torch import Tensor, nn

from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.nn.transformer import output_projection
from qdbev.ops.msda import LevelSizes, MultiScaleDeformableAttention
from qdbev.ops.sca import SpatialCrossAttention


def _ray_bias(num_heads: int, num_maps: int, num_points: int) -> Tensor:
    """Return offsets, flat: point p of head k is p + 1 cells away at the angle 2 pi k / num_heads."""
    angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    ray = torch.stack((angle.cos(), angle.sin()), -1)
    ray = ray / ray.abs().amax(-1, keepdim=True)
    reach = torch.arange(1, num_points + 1, dtype=torch.float32).view(1, 1, -1, 1)
    return (ray.view(num_heads, 1, 1, 2) * reach).expand(-1, num_maps, -1, -1).flatten()


class _DeformableProjections(nn.Module):
    """The linear layers that every deformable attention has, for offsets, logits and values."""

    def __init__(self, query_dim: int, embed_dim: int, num_heads: int, num_maps: int, num_points: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(query_dim, num_heads * num_maps * num_points * 2)
        self.attention_weights = nn.Linear(query_dim, num_heads * num_maps * num_points)
        self.value_proj = output_projection(embed_dim)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(_ray_bias(num_heads, num_maps, num_points))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)


class _BevAttention(_DeformableProjections):
    """Deformable attention to `num_maps` BEV maps of one level, with the projection of its result."""

    def __init__(self, config: BEVFormerConfig, query_dim: int, num_maps: int) -> None:
        super().__init__(query_dim, config.embed_dim, config.num_heads, num_maps, config.num_points)
        self.attention = MultiScaleDeformableAttention()
        self.output_proj = output_projection(config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)


class TemporalSelfAttention(_BevAttention):
    """Attention of each BEV cell to the previous and to the current BEV; the two results are averaged."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__(config, 2 * config.embed_dim, num_maps=2)

    def forward(self, query: Tensor, query_pos: Tensor, queue: Tensor, reference_points: Tensor, bev_hw: tuple[int, int]) -> Tensor:
        """Map BEV features `query` (B, K, C) with their positional embedding `query_pos` (B, K, C) to (B, K, C).

        `queue` (B, 2, K, C) has the values of the previous BEV and of the current one, `reference_points` (B, 2, K, 2) the positions
        from 0 to 1 over each.
        """
        B, K, C = query.shape
        M, P = self.num_heads, self.num_points
        both = torch.cat((queue[:, 0], query + query_pos), -1)  # (B, K, 2C)
        offsets = self.sampling_offsets(both).view(B, K, M, 2, 1, P, 2)
        logits = self.attention_weights(both).view(B, K, M, 2, 1, P)
        read = self.attention(
            self.value_proj(queue).view(B * 2, K, M, C // M),
            reference_points.flatten(0, 1),
            offsets.permute(0, 3, 1, 2, 4, 5, 6).reshape(B * 2, K, M, 1, P, 2),
            logits.permute(0, 3, 1, 2, 4, 5).reshape(B * 2, K, M, 1, P),
            [bev_hw],
        )
        return self.dropout(self.output_proj(read.view(B, 2, K, C).mean(1))) + query


class CameraCrossAttention(nn.Module):
    """Attention of each BEV cell to the cameras that see its pillar; its layers are named as in the official keys."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        C, L = config.embed_dim, config.num_levels
        self.num_levels = L
        self.deformable_attention = _DeformableProjections(C, C, config.num_heads, L, config.num_spatial_points)
        self.attention = SpatialCrossAttention()
        self.output_proj = output_projection(C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, query: Tensor, tokens: Tensor, reference_points: Tensor, visible: Tensor, level_hw: LevelSizes) -> Tensor:
        """Map BEV features `query` (B, K, C) to (B, K, C).

        `tokens` (B, N, S, C) are the image tokens of all levels; `reference_points` (B, N, K, D, 2) and `visible` (B, N, K) are as in
        qdbev/ops/sca.py.
        """
        B, K, C = query.shape
        inner = self.deformable_attention
        M, L, P = inner.num_heads, self.num_levels, inner.num_points
        read = self.attention(
            inner.value_proj(tokens).view(*tokens.shape[:3], M, C // M),
            reference_points,
            visible,
            inner.sampling_offsets(query).view(B, K, M, L, P, 2),
            inner.attention_weights(query).view(B, K, M, L, P),
            level_hw,
        )
        return self.dropout(self.output_proj(read)) + query


class BevCrossAttention(_BevAttention):
    """Attention of each object query to the BEV around its reference point."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__(config, config.embed_dim, num_maps=1)

    def forward(self, query: Tensor, query_pos: Tensor, bev: Tensor, reference_points: Tensor, bev_hw: tuple[int, int]) -> Tensor:
        """Map object queries `query` (B, Q, C) with their positional embedding `query_pos` (B, Q, C) to (B, Q, C).

        `bev` (B, K, C) has the BEV features, `reference_points` (B, Q, 2) the positions from 0 to 1 over the BEV.
        """
        B, Q, C = query.shape
        M, P = self.num_heads, self.num_points
        positioned = query + query_pos
        read = self.attention(
            self.value_proj(bev).view(B, -1, M, C // M),
            reference_points,
            self.sampling_offsets(positioned).view(B, Q, M, 1, P, 2),
            self.attention_weights(positioned).view(B, Q, M, 1, P),
            [bev_hw],
        )
        return self.dropout(self.output_proj(read)) + query
