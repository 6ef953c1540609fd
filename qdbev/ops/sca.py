"""Spatial cross-attention: BEV queries read from the cameras that see them. One contract, several implementations that must agree.

    here       PyTorch, gathering only the queries each camera sees; trains, runs anywhere
    sca_dense  PyTorch, every camera reading every query: what the ONNX body computes; results/attention_cpu.json says what each costs
    CUDA       a kernel, in evaluation, once plugins/torch_ops.py has registered it
    ONNX       one node of domain `qdbev`, with a local function of the same name as its body (export/bodies)
    TensorRT   a plugin of the same name, or the function body where there is none (plugins/README.md)

Offsets and logits depend on the query only, so they are given once and not once a camera; which cameras see a query, the sum over
them and the division by their number belong to the operator. Source: BEVFormer (arXiv:2203.17270), equation 3.

B batch, N cameras, S keys of all levels, M heads, C channels a head, Q queries, D pillar points, L levels, P points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, library, nn

from qdbev.ops.msda import check_levels, evaluated_on_gpu, joint_softmax, level_wh, weighted_samples


class SpatialCrossAttention(nn.Module):
    """The operator as a module, so that quantization can put a quantizer on `value`."""

    quantized_inputs = (0,)

    def forward(
        self,
        value: Tensor,
        reference_points: Tensor,
        visible: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        level_hw: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Args and result as `spatial_cross_attention`."""
        return spatial_cross_attention(value, reference_points, visible, sampling_offsets, attention_logits, level_hw)


def spatial_cross_attention(
    value: Tensor,
    reference_points: Tensor,
    visible: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_hw: Sequence[tuple[int, int]],
) -> Tensor:
    """Average over the cameras that see a query of what it reads there.

    Args:
        value: (B, N, S, M, C) projected keys of each camera, levels concatenated in the order of `level_hw`.
        reference_points: (B, N, Q, D, 2) where the query's pillar points appear, as (u, v) in 0..1 of the padded image.
        visible: (B, N, Q), one where the camera sees any of the pillar points, else zero.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y), in cells of each level; point p belongs to pillar point p modulo D.
        attention_logits: (B, Q, M, L, P), softmaxed over (L, P) together.
        level_hw: Height and width of each level.

    Returns:
        (B, Q, M * C); zero where no camera sees the query.

    Raises:
        ValueError: `level_hw` does not add up to S, or P is no multiple of D.
    """
    check_levels(value.shape[2], level_hw)
    num_points, num_pillar_points = sampling_offsets.shape[-2], reference_points.shape[-2]
    if num_points % num_pillar_points:
        raise ValueError(f"{num_points} sampling points cannot be shared among {num_pillar_points} pillar points")
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
    """Args and result as `spatial_cross_attention`; each camera computes only the queries it sees, padded to the most that one sees (K)."""
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
