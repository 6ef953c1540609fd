"""Camera cross-attention computed as in the official code, with our weights; bench/attention_cost.py compares ours with it.

Queries are sorted by camera and padded to the largest number before the linear layers, so a query is projected once for every camera that
sees it. Our models do not use this. Source: structure of bevformer modules/spatial_cross_attention.py at 66b65f3.

B batch, N cameras, S keys of all levels, K BEV cells, R re-batched queries of a camera, M heads, C width, L levels, P points, D heights.
"""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qdbev.detectors.bevformer.attention import CameraCrossAttention
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.encoder import Encoder
from qdbev.ops.msda import level_wh


class PaddedCrossAttention(CameraCrossAttention):
    """Camera cross-attention with the inputs, outputs and weights of `CameraCrossAttention`, but padded queries."""

    def forward(
        self, query: Tensor, tokens: Tensor, reference_points: Tensor, visible: Tensor, level_hw: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Arguments and result are those of `CameraCrossAttention.forward`."""
        seen = {place: visible[place].nonzero().squeeze(1) for place in product(*map(range, visible.shape[:2]))}
        queries = pad_sequence([query[sample, indices] for (sample, _), indices in seen.items()], batch_first=True)  # (B*N, R, C)
        references = pad_sequence([reference_points[place][indices] for place, indices in seen.items()], batch_first=True)  # (B*N, R, D, 2)
        read = self._attend(queries, tokens.flatten(0, 1), references, level_hw)
        slots = torch.zeros_like(query)
        for ((sample, _), indices), row in zip(seen.items(), read, strict=True):
            slots[sample, indices] += row[: len(indices)]
        slots = slots / visible.sum(1).clamp(min=1)[..., None]
        return self.dropout(self.output_proj(slots)) + query

    def _attend(self, queries: Tensor, tokens: Tensor, references: Tensor, level_hw: Sequence[tuple[int, int]]) -> Tensor:
        """Deformable attention of queries (B*N, R, C) at references (B*N, R, D, 2) to tokens (B*N, S, C); returns (B*N, R, C)."""
        cameras, R, C = queries.shape
        inner, D = self.deformable_attention, references.shape[2]
        M, L, P = inner.num_heads, self.num_levels, inner.num_points
        value = inner.value_proj(tokens).view(cameras, -1, M, C // M)
        offsets = inner.sampling_offsets(queries).view(cameras, R, M, L, P, 2)
        weights = inner.attention_weights(queries).view(cameras, R, M, L * P).softmax(-1)
        offsets = (offsets / level_wh(level_hw, offsets)).view(cameras, R, M, L, P // D, D, 2)
        locations = (references[:, :, None, None, None] + offsets).view(cameras, R, M, L, P, 2)
        grids = (2 * locations - 1).unbind(3)
        reads = []
        for (h, w), level, points in zip(level_hw, value.split([h * w for h, w in level_hw], dim=1), grids, strict=True):
            image = level.flatten(2).transpose(1, 2).reshape(cameras * M, C // M, h, w)
            grid = points.transpose(1, 2).flatten(0, 1)  # (B*N*M, R, P, 2)
            reads.append(F.grid_sample(image, grid, align_corners=False))
        weights = weights.transpose(1, 2).reshape(cameras * M, 1, R, L * P)
        out = (torch.stack(reads, dim=-2).flatten(-2) * weights).sum(-1)  # (B*N*M, C/M, R)
        return out.view(cameras, C, R).transpose(1, 2)


def pad_attention(encoder: Encoder, config: BEVFormerConfig) -> None:
    """Replace every camera cross-attention of `encoder` by a padded one with the same weights."""
    for layer in encoder.layers:
        padded = PaddedCrossAttention(config)
        padded.load_state_dict(layer.spatial.state_dict())
        layer.spatial = padded.train(layer.training)
