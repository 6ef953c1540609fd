"""The decoder: object queries attend to the BEV and refine their reference points from layer to layer.

Source: Deformable DETR (arXiv:2010.04159), box refinement; bevformer modules/decoder.py at 66b65f3.

B batch, C width, K BEV cells, Q queries.
"""

import torch
from torch import Tensor, nn

from qdbev.detectors.bevformer.attention import BevCrossAttention
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.nn.set_head import Decoded
from qdbev.nn.transformer import FeedForward, SelfAttention

_EPS = 1e-5
"""Distance from 0 and 1 that keeps logits finite."""


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Return the logit of `x`, limited to finite values."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=_EPS) / (1 - x).clamp(min=_EPS))


class DecoderLayer(nn.Module):
    """Self-attention, attention to the BEV, and feed-forward, each followed by a LayerNorm."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.bev_hw = config.bev_hw
        self.self_attention = SelfAttention(config.embed_dim, config.num_heads, config.dropout)
        self.cross_attention = BevCrossAttention(config)
        self.ffn = FeedForward(config.embed_dim, config.ffn_dim, config.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(config.embed_dim) for _ in range(3))

    def forward(self, query: Tensor, query_pos: Tensor, bev: Tensor, reference_points: Tensor) -> Tensor:
        """Map query and query_pos (B, Q, C), bev (B, K, C) and reference_points (B, Q, 2) to the refined query (B, Q, C)."""
        query = self.norms[0](self.self_attention(query, query_pos))
        query = self.norms[1](self.cross_attention(query, query_pos, bev, reference_points, self.bev_hw))
        return self.norms[2](self.ffn(query))


class Decoder(nn.Module):
    """Query embeddings, a linear layer for their first reference points, and the decoder layers."""

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.query_embedding = nn.Embedding(config.num_query, 2 * config.embed_dim)
        self.reference_points = nn.Linear(config.embed_dim, 3)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, bev: Tensor, reg_branches: nn.ModuleList) -> list[Decoded]:
        """Decode a BEV (B, K, C) to one result for each layer. The reference of every layer but the first has no gradient."""
        query_pos, query = self.query_embedding.weight.chunk(2, -1)  # (Q, C) each
        B = bev.shape[0]
        query_pos, query = query_pos.expand(B, -1, -1), query.expand(B, -1, -1)
        reference = self.reference_points(query_pos).sigmoid()
        results = []
        for layer, reg_branch in zip(self.layers, reg_branches, strict=True):
            query = layer(query, query_pos, bev, reference[..., :2])
            regression = reg_branch(query)
            logits = inverse_sigmoid(reference)
            results.append(Decoded(query, regression, logits))
            reference = (logits + regression[..., (0, 1, 4)]).sigmoid().detach()
        return results
