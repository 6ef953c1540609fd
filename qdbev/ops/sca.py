"""Spatial cross-attention: BEV queries read features of the cameras that see them.

There is one contract, and several implementations that must give the same results:

    here       PyTorch; each camera computes only the queries that it sees; can be trained and runs on any device
    sca_dense  PyTorch; each camera computes every query, as the ONNX body does; results/attention_cpu.json has the costs of both
    CUDA       a kernel; runs where no gradient is needed, once `plugins.torch_ops.install()` has registered it
    ONNX       one node of domain `qdbev`, with a local function of the same name as its body (export/bodies/attention.py)
    TensorRT   a plugin of the same name, or the function body where there is no plugin (plugins/README.md)

Offsets and logits depend only on the query, so all cameras share one set of them. The mask of the cameras that see a query, the sum over
these cameras and the division by their number are part of the operator. Source: BEVFormer (arXiv:2203.17270), equation 3.

B batch, N cameras, S keys of all levels, M heads, C channels of a head, Q queries, D pillar points, L levels, P points of a level.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library, nn

from qdbev.ops.msda import check_levels, evaluated_on_gpu, joint_softmax, level_wh, weighted_samples


class SpatialCrossAttention(nn.Module):
    """The operator as a module, so that quantization can put a quantizer on its argument `value`."""

    quantized_inputs = (0,)
    """Indices of the arguments that quantization puts quantizers on."""

    def forward(self, *inputs: Any) -> Tensor:
        """Arguments and result are those of `spatial_cross_attention`, all positional."""
        return spatial_cross_attention(*inputs)


def spatial_cross_attention(
    value: Tensor,
    reference_points: Tensor,
    visible: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_hw: Sequence[tuple[int, int]],
) -> Tensor:
    """Deformable attention of each query to all cameras that see it, averaged over these cameras.

    The implementation is chosen as in `qdbev.ops.msda.multi_scale_deformable_attention`. During export, and for CUDA tensors that need no
    gradient, it is the custom operator, which runs the CUDA kernel if `plugins.torch_ops.install()` was called in this process. Otherwise
    it is the PyTorch code of this file.

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
    if torch.compiler.is_exporting() or evaluated_on_gpu(value, reference_points, visible, sampling_offsets, attention_logits):
        flat = [size for hw in level_hw for size in hw]
        return torch.ops.qdbev.spatial_cross_attention(value, reference_points, visible, sampling_offsets, attention_logits, flat)
    return gathered_spatial_cross_attention(value, reference_points, visible, sampling_offsets, attention_logits, level_hw)


def gathered_spatial_cross_attention(
    value: Tensor,
    reference_points: Tensor,
    visible: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_hw: Sequence[tuple[int, int]],
) -> Tensor:
    """The PyTorch implementation, in which each camera computes only the queries that it sees.

    Arguments and result are those of `spatial_cross_attention`. All cameras are padded to K queries, the most that any of them sees.
    """
    B, N, _, M, C = value.shape
    Q, L, P = sampling_offsets.shape[1], sampling_offsets.shape[3], sampling_offsets.shape[4]
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


@library.custom_op("qdbev::spatial_cross_attention", mutates_args=())
def _node(
    value: Tensor,
    reference_points: Tensor,
    visible: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_hw: Sequence[int],
) -> Tensor:
    pairs = list(zip(level_hw[::2], level_hw[1::2], strict=True))
    return gathered_spatial_cross_attention(value, reference_points, visible, sampling_offsets, attention_logits, pairs)


@_node.register_fake
def _(
    value: Tensor,
    reference_points: Tensor,
    visible: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_hw: Sequence[int],
) -> Tensor:
    B, _, _, M, C = value.shape
    return value.new_empty(B, sampling_offsets.shape[1], M * C)
