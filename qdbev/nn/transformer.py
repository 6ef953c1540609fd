"""Transformer blocks that several detectors share. Each adds its input to its result; the caller normalises.

Source: Attention Is All You Need (arXiv:1706.03762), section 3.2; mmcv 1.4.0 bricks/transformer.py.

B batch, C width, M heads, Q queries.
"""

from torch import Tensor, nn

from qdbev.ops.matmul import Matmul


def output_projection(embed_dim: int) -> nn.Linear:
    """Build a linear layer (..., embed_dim) to (..., embed_dim) with Xavier weights and zero bias."""
    layer = nn.Linear(embed_dim, embed_dim)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SelfAttention(nn.Module):
    """Multi-head attention among object queries, as nn.MultiheadAttention; each product is a module, so that it can be quantized."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (output_projection(embed_dim) for _ in range(3))
        self.scores = Matmul()
        self.mix = Matmul()
        self.out_proj = output_projection(embed_dim)
        self.attention_dropout = nn.Dropout(dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, query_pos: Tensor) -> Tensor:
        """Map query and query_pos, both (B, Q, C), to (B, Q, C), with `query` added."""
        B, Q, C = query.shape
        positioned = query + query_pos
        q, k, v = (
            project(x).view(B, Q, self.num_heads, -1).transpose(1, 2)  # (B, M, Q, C/M)
            for project, x in ((self.q_proj, positioned), (self.k_proj, positioned), (self.v_proj, query))
        )
        scores = self.scores(q * (C // self.num_heads) ** -0.5, k.transpose(2, 3))  # (B, M, Q, Q)
        mixed = self.mix(self.attention_dropout(scores.softmax(-1)), v)
        return self.dropout(self.out_proj(mixed.transpose(1, 2).reshape(B, Q, C))) + query


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, embed_dim: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Q, C) to (B, Q, C), with `x` added."""
        return self.dropout(self.linear2(self.dropout(self.relu(self.linear1(x))))) + x
