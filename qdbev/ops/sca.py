"""Spatial cross-attention: BEV queries read features of the cameras that see them.

The implementations are those of qdbev/ops/msda.py, with two forms in PyTorch: gathered, in which each camera computes only the queries that
it sees, and dense, in which it computes every query, as the ONNX body does. results/attention_cpu.json has the costs of both.

Offsets and logits depend only on the query, so all cameras share one set of them. The mask of the cameras that see a query, the sum over
these cameras and the division by their number are part of the operator. Source: BEVFormer (arXiv:2203.17270), equation 3.

B batch, N cameras, S keys of all levels, M heads, C channels of a head, Q queries, D pillar points, L levels, P points of a level.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library, nn

from qdbev.ops.kernels import run_operator
from qdbev.ops.msda import LevelSizes, check_levels, joint_softmax, level_wh, weighted_samples


class SpatialCrossAttention(nn.Module):
    """`spatial_cross_attention` as a module with the same positional arguments, so that `value` can get a quantizer."""

    quantized_inputs = (0,)

    def forward(self, *inputs: Any) -> Tensor:
        return spatial_cross_attention(*inputs)


def spatial_cross_attention(
    value: Tensor, reference_points: Tensor, visible: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: LevelSizes
) -> Tensor:
    """Deformable attention of each query to all cameras that see it, averaged over these cameras.

    The implementation is chosen as in `qdbev.ops.msda.multi_scale_deformable_attention`; the PyTorch code is the gathered form.

    Args:
        value: (B, N, S, M, C) projected keys of each camera, with the levels concatenated in the order of `level_hw`.
        reference_points: (B, N, Q, D, 2) projections of the pillar points of a query, as (u, v) in 0..1 of the padded image.
        visible: (B, N, Q), one where the camera sees any of the pillar points, else zero.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y), in cells of each level; point p is added to pillar point p modulo D.
        attention_logits: (B, Q, M, L, P); the softmax runs over L and P together.
        level_hw: Height and width of each level in cells; constants of an exported graph.

    Returns:
        (B, Q, M * C); zero where no camera sees the query.

    Raises:
        ValueError: `level_hw` does not add up to S, or P is no multiple of D.
    """
    check_levels(value.shape[2], level_hw)
    num_points, num_pillar_points = sampling_offsets.shape[-2], reference_points.shape[-2]
    if num_points % num_pillar_points:
        raise ValueError(f"{num_points} sampling points cannot be shared among {num_pillar_points} pillar points; use a multiple")
    tensors = (value, reference_points, visible, sampling_offsets, attention_logits)
    if run_operator(*tensors):
        return torch.ops.qdbev.spatial_cross_attention(*tensors, [size for hw in level_hw for size in hw])
    return gathered_spatial_cross_attention(*tensors, level_hw)


def gathered_spatial_cross_attention(
    value: Tensor, reference_points: Tensor, visible: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: LevelSizes
) -> Tensor:
    """Compute, for each camera, only the queries that it sees; arguments and result are those of `spatial_cross_attention`.

    All cameras are padded to K queries, the most that any of them sees.
    """
    B, N, _, M, C = value.shape
    Q, _, L, P = sampling_offsets.shape[1:5]
    D = reference_points.shape[-2]
    seen, query = visible.flatten(0, 1).sort(dim=1, descending=True, stable=True)  # (B*N, Q)
    K = max(int((visible > 0).sum(-1).max()), 1)
    seen, query = seen[:, :K], query[:, :K]
    sample = torch.arange(B, device=value.device).repeat_interleave(N)[:, None]  # (B*N, 1)
    camera = torch.arange(B * N, device=value.device)[:, None]

    offsets = sampling_offsets[sample, query] / level_wh(level_hw, sampling_offsets)  # (B*N, K, M, L, P, 2)
    pillars = reference_points.flatten(0, 1)[camera, query][:, :, None, None, None]  # (B*N, K, 1, 1, 1, D, 2)
    locations = (offsets.unflatten(4, (P // D, D)) + pillars).view(B * N, K, M, L, P, 2)
    share = seen / visible.sum(1).clamp(min=1)[sample, query]  # (B*N, K)
    weights = joint_softmax(attention_logits)[sample, query] * share[..., None, None, None]
    read = weighted_samples(value.flatten(0, 1), level_hw, locations, weights)  # (B*N, K, M*C)
    out = read.new_zeros(B * Q, M * C).index_add(0, (sample * Q + query).flatten(), read.flatten(0, 1))
    return out.view(B, Q, M * C)


def dense_spatial_cross_attention(
    value: Tensor, reference_points: Tensor, visible: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: LevelSizes
) -> Tensor:
    """Compute every query for one camera after the other; arguments and result are those of `spatial_cross_attention`.

    Its shapes are static, as in the ONNX function body. The gathered form is several times cheaper, and so the network uses that one;
    this one gives the gradients of the CUDA kernel (plugins/torch_ops.py).
    """
    B, N, _, M, C = value.shape
    Q, _, L, P = sampling_offsets.shape[1:5]
    D = reference_points.shape[-2]
    offsets = (sampling_offsets / level_wh(level_hw, sampling_offsets)).unflatten(4, (P // D, D))  # (B, Q, M, L, P/D, D, 2)
    weights = joint_softmax(attention_logits)
    total = value.new_zeros(B, Q, M * C)
    for camera in range(N):
        pillars = reference_points[:, camera, :, None, None, None]  # (B, Q, 1, 1, 1, D, 2)
        locations = (offsets + pillars).view(B, Q, M, L, P, 2)
        total = total + weighted_samples(value[:, camera], level_hw, locations, weights) * visible[:, camera, :, None]
    return total / visible.sum(1).clamp(min=1)[..., None]


@library.custom_op("qdbev::spatial_cross_attention", mutates_args=())
def _node(
    value: Tensor, reference_points: Tensor, visible: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: Sequence[int]
) -> Tensor:
    pairs = list(zip(level_hw[::2], level_hw[1::2], strict=True))
    return gathered_spatial_cross_attention(value, reference_points, visible, sampling_offsets, attention_logits, pairs)


@_node.register_fake
def _(value: Tensor, reference_points: Tensor, visible: Tensor, sampling_offsets: Tensor, *_: Any) -> Tensor:
    B, _, _, M, C = value.shape
    return value.new_empty(B, sampling_offsets.shape[1], M * C)
