"""Multi-scale deformable attention: one contract, several implementations that must agree.

    here       PyTorch; trains, runs anywhere, and is what every other implementation is compared with
    CUDA       a kernel, in evaluation, once plugins/torch_ops.py has registered it
    ONNX       one node of domain `qdbev`, with a local function of the same name as its body (export/bodies)
    TensorRT   a plugin of the same name, or the function body where there is none (plugins/README.md)

Softmax and reference + offset arithmetic belong to the operator. Source: Deformable DETR (arXiv:2010.04159), equation 3.

B batch, S keys of all levels, M heads, C channels a head, Q queries, L levels, P points.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn


class MultiScaleDeformableAttention(nn.Module):
    """The operator as a module, so that quantization can put a quantizer on `value`."""

    quantized_inputs = (0,)

    def forward(
        self,
        value: Tensor,
        reference_points: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        level_hw: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Args and result as `multi_scale_deformable_attention`."""
        return multi_scale_deformable_attention(value, reference_points, sampling_offsets, attention_logits, level_hw)


def multi_scale_deformable_attention(
    value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: Sequence[tuple[int, int]]
) -> Tensor:
    """Attend to a few points around each query's reference.

    Args:
        value: (B, S, M, C) projected keys, levels concatenated in the order of `level_hw`.
        reference_points: (B, Q, 2) as (x, y) in 0..1; (0, 0) and (1, 1) are the outer corners of the corner cells.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y), in cells of each level.
        attention_logits: (B, Q, M, L, P), softmaxed over (L, P) together.
        level_hw: Height and width of each level; static, so the exported graph is too.

    Returns:
        (B, Q, M * C). Samples outside a level read zero.

    Raises:
        ValueError: `level_hw` does not add up to S.
    """
    check_levels(value.shape[1], level_hw)
    if torch.compiler.is_exporting() or evaluated_on_gpu(value, reference_points, sampling_offsets, attention_logits):
        flat = [size for hw in level_hw for size in hw]
        return torch.ops.qdbev.multi_scale_deformable_attention(value, reference_points, sampling_offsets, attention_logits, flat)
    return _sampled(value, reference_points, sampling_offsets, attention_logits, level_hw)


def evaluated_on_gpu(*tensors: Tensor) -> bool:
    """Whether these are CUDA tensors and no gradient is asked for: the operator is called, which may have a kernel."""
    return tensors[0].is_cuda and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _sampled(
    value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: Sequence[tuple[int, int]]
) -> Tensor:
    """The equation."""
    locations = reference_points[:, :, None, None, None] + sampling_offsets / level_wh(level_hw, sampling_offsets)
    return weighted_samples(value, level_hw, locations, joint_softmax(attention_logits))


def weighted_samples(value: Tensor, level_hw: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Read `value` (B, S, M, C) at `locations` (B, Q, M, L, P, 2) bilinearly and sum with `weights` (B, Q, M, L, P): (B, Q, M * C)."""
    B, _, M, C = value.shape
    Q = locations.shape[1]
    sizes = [h * w for h, w in level_hw]
    grid = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B*M, Q, P, 2)
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, B*M, 1, Q, P)
    out = value.new_zeros(B * M, C, Q)
    # Level by level: what all levels read, side by side, would be the largest tensor of the network.
    for (h, w), level, points, weight in zip(level_hw, value.split(sizes, dim=1), grid, weights, strict=True):
        image = level.permute(0, 2, 3, 1).reshape(B * M, C, h, w)
        out = out + (F.grid_sample(image, points, align_corners=False) * weight).sum(-1)  # (B*M, C, Q, P) summed over P
    return out.view(B, M * C, Q).transpose(1, 2)


def joint_softmax(logits: Tensor) -> Tensor:
    """Softmax over the last two axes (L, P) together."""
    return logits.flatten(-2).softmax(-1).view_as(logits)


def level_wh(level_hw: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """(L, 1, 2) width and height of each level, to divide offsets of shape (..., L, P, 2)."""
    return torch.tensor([(w, h) for h, w in level_hw], dtype=like.dtype, device=like.device)[:, None]


def check_levels(num_keys: int, level_hw: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless the levels hold `num_keys` keys."""
    total = sum(h * w for h, w in level_hw)
    if total != num_keys:
        raise ValueError(f"level_hw {list(level_hw)} covers {total} keys, value has {num_keys}")


@library.custom_op("qdbev::multi_scale_deformable_attention", mutates_args=())
def _node(value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: Sequence[int]) -> Tensor:
    pairs = list(zip(level_hw[::2], level_hw[1::2], strict=True))
    return _sampled(value, reference_points, sampling_offsets, attention_logits, pairs).contiguous()


@_node.register_fake
def _(value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: Sequence[int]) -> Tensor:
    B, _, M, C = value.shape
    return value.new_empty(B, sampling_offsets.shape[1], M * C)
