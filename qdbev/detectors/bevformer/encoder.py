"""The encoder: computes the current BEV from image features and the previous BEV.

Source: BEVFormer (arXiv:2203.17270), section 3; bevformer modules/{transformer,encoder}.py at 66b65f3.

B batch, N cameras, C width, K BEV cells (H * W, row-major).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qdbev.can_bus import YAW_DEG, YAW_RAD
from qdbev.detectors.bevformer.attention import CameraCrossAttention, TemporalSelfAttention
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.geometry import cell_centers, pillar_points, project
from qdbev.nn.transformer import FeedForward
from qdbev.ops.rotate import rotate_bev

_LEVEL_EMBEDDINGS = 4
"""Rows of the table of level embeddings, which is the same in all official models, whatever their number of levels."""


class Views(NamedTuple):
    """Image tokens of all cameras, and the positions of the BEV cells in them.

    tokens: (B, N, S, C) features of all levels.
    level_hw: Height and width of each level.
    reference_points: (B, N, K, D, 2) normalised (u, v) of D pillar points of each cell.
    visible: (B, N, K) one where the camera sees the cell, else zero.
    """

    tokens: Tensor
    level_hw: Sequence[tuple[int, int]]
    reference_points: Tensor
    visible: Tensor


class EncoderLayer(nn.Module):
    """Temporal self-attention, attention to the cameras, and feed-forward, each followed by a LayerNorm."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.bev_hw = config.bev_hw
        self.temporal = TemporalSelfAttention(config)
        self.spatial = CameraCrossAttention(config)
        self.ffn = FeedForward(config.embed_dim, config.ffn_dim, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(config.embed_dim) for _ in range(3))

    def forward(self, query: Tensor, query_pos: Tensor, queue: Tensor, reference_points: Tensor, views: Views) -> Tensor:
        """Map the BEV query (B, K, C) to (B, K, C); the other arguments are as in attention.py."""
        query = self.norms[0](self.temporal(query, query_pos, queue, reference_points, self.bev_hw))
        query = self.norms[1](self.spatial(query, views.tokens, views.reference_points, views.visible, views.level_hw))
        return self.norms[2](self.ffn(query))


class Encoder(nn.Module):
    """BEV queries, their projection into the cameras, and the encoder layers."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.bev_hw
        C = config.embed_dim
        self.bev_embedding = nn.Embedding(rows * columns, C)
        self.row_embed = nn.Embedding(rows, C // 2)
        self.col_embed = nn.Embedding(columns, C // 2)
        self.can_bus_mlp = nn.Sequential(nn.Linear(18, C // 2), nn.ReLU(), nn.Linear(C // 2, C), nn.ReLU())
        self.can_bus_norm = nn.LayerNorm(C)
        self.camera_embed = nn.Parameter(torch.randn(config.num_cameras, C))
        self.level_embed = nn.Parameter(torch.randn(_LEVEL_EMBEDDINGS, C))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.register_buffer("cells", cell_centers(config.bev_hw), persistent=False)
        self.register_buffer("pillars", pillar_points(config.bev_hw, config.num_pillar_points, config.pc_range), persistent=False)
        for layer in (self.can_bus_mlp[0], self.can_bus_mlp[2]):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self, features: Sequence[Tensor], lidar2img: Tensor, can_bus: Tensor, image_hw: tuple[int, int], prev_bev: Tensor, has_prev: Tensor
    ) -> Tensor:
        """Compute the BEV features (B, K, C).

        Args:
            features: For each level (B, N, C, h, w).
            lidar2img: (B, N, 4, 4) from lidar metres to pixels of the padded image.
            can_bus: (B, 18), relative to the previous frame.
            image_hw: Padded height and width.
            prev_bev: (B, K, C) BEV of the previous frame.
            has_prev: (B,) one where `prev_bev` is read, zero where it is ignored.
        """
        B = can_bus.shape[0]
        initial = self.bev_embedding.weight + self.can_bus_norm(self.can_bus_mlp(self._motion(can_bus)))[:, None]  # (B, K, C)
        query_pos = self._positions().expand(B, -1, -1)
        views = self._views(features, lidar2img, image_hw)
        rotated = rotate_bev(prev_bev, can_bus[:, YAW_DEG], self.config.bev_hw, self.config.rotate_center)
        reference_points = self._temporal_references(can_bus, has_prev)
        known = has_prev.view(B, 1, 1) > 0
        query = initial
        for layer in self.layers:
            # Selected before stacking: an engine selects while it quantizes, and then needs no kernel for the stacks.
            queue = torch.stack((torch.where(known, rotated, query), torch.where(known, initial, query)), 1)  # (B, 2, K, C)
            query = layer(query, query_pos, queue, reference_points, views)
        return query

    def _motion(self, can_bus: Tensor) -> Tensor:
        """Return what the network reads of `can_bus` (B, 18); see `BEVFormerConfig.absolute_yaw`."""
        if self.config.absolute_yaw:
            return can_bus
        turn = can_bus[:, YAW_DEG:]  # (B, 1)
        turn = turn - 360 * (turn / 360).round()
        return torch.cat((can_bus[:, :YAW_RAD], turn.deg2rad(), turn), 1)

    def _positions(self) -> Tensor:
        """Return (K, C) positional embeddings: the column's embedding, then the row's."""
        rows, columns = self.config.bev_hw
        x = self.col_embed.weight.expand(rows, -1, -1)  # (H, W, C/2)
        y = self.row_embed.weight[:, None].expand(-1, columns, -1)
        return torch.cat((x, y), -1).flatten(0, 1)

    def _views(self, features: Sequence[Tensor], lidar2img: Tensor, image_hw: tuple[int, int]) -> Views:
        tokens = [
            feature.flatten(3).transpose(2, 3) + self.camera_embed[:, None] + self.level_embed[level]  # (B, N, h*w, C)
            for level, feature in enumerate(features)
        ]
        reference_points, hit = project(self.pillars, lidar2img, image_hw)
        level_hw = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        return Views(torch.cat(tokens, 2), level_hw, reference_points, hit.any(-1).to(reference_points.dtype))

    def _temporal_references(self, can_bus: Tensor, has_prev: Tensor) -> Tensor:
        """Return (B, 2, K, 2) normalised positions of each cell in the previous BEV and in the current one."""
        x_min, y_min, _, x_max, y_max, _ = self.config.pc_range
        dx, dy, yaw = can_bus[:, 0], can_bus[:, 1], can_bus[:, YAW_RAD]
        forward = dx * yaw.cos() + dy * yaw.sin()
        sideways = dx * yaw.sin() - dy * yaw.cos()
        shift = torch.stack((sideways / (x_max - x_min), forward / (y_max - y_min)), -1) * has_prev[:, None]  # (B, 2)
        shifted = self.cells + shift[:, None]  # (B, K, 2)
        current = shifted if self.config.shifted_reference else self.cells.expand_as(shifted)
        return torch.stack((shifted, current), 1)
