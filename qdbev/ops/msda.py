"""Multi-scale deformable attention: one contract, and several implementations that must give the same results.

    here       PyTorch; can be trained, runs on any device, and is the reference for all other implementations
    CUDA       a kernel; runs where no gradient is needed, once `plugins.torch_ops.install()` has registered it
    CPU        a kernel with gradients, once `plugins.torch_ops.install_on_cpu()` has registered it; also OpenVINO's (plugins/cpu)
    ONNX       one node of domain `qdbev`, with a local function of the same name as its body (export/bodies/attention.py)
    TensorRT   a plugin of the same name, or the function body where there is no plugin (plugins/README.md)

The softmax over the logits and the sum of reference points and offsets are part of the operator. Source: Deformable DETR
(arXiv:2010.04159), equation 3.

B batch, S keys of all levels, M heads, C channels of a head, Q queries, L levels, P points of a level.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from qdbev.ops.kernels import run_operator

LevelSizes = Sequence[tuple[int, int]]
"""Height and width of each level in cells."""


class MultiScaleDeformableAttention(nn.Module):
    """`multi_scale_deformable_attention` as a module with the same positional arguments, so that `value` can get a quantizer."""

    quantized_inputs = (0,)

    def forward(self, *inputs: Any) -> Tensor:
        return multi_scale_deformable_attention(*inputs)


def multi_scale_deformable_attention(
    value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: LevelSizes
) -> Tensor:
    """Attend to a few points around the reference point of each query.

    Where `qdbev.ops.kernels.run_operator` says so, this calls the custom operator `torch.ops.qdbev.multi_scale_deformable_attention`. It
    becomes one ONNX node in an export, and else runs the kernel that `plugins.torch_ops` has registered in this process, if any. In all
    other cases the PyTorch code of this file runs.

    Args:
        value: (B, S, M, C) projected keys, with the levels concatenated in the order of `level_hw`.
        reference_points: (B, Q, 2) as (x, y) in 0..1; (0, 0) and (1, 1) are the outer corners of the corner cells.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y), in cells of each level.
        attention_logits: (B, Q, M, L, P); the softmax runs over L and P together.
        level_hw: Height and width of each level in cells; constants of an exported graph.

    Returns:
        (B, Q, M * C). Samples are interpolated bilinearly, and are zero outside a level.

    Raises:
        ValueError: `level_hw` does not add up to S.
    """
    check_levels(value.shape[1], level_hw)
    tensors = (value, reference_points, sampling_offsets, attention_logits)
    if run_operator(*tensors):
        return torch.ops.qdbev.multi_scale_deformable_attention(*tensors, [size for hw in level_hw for size in hw])
    return _sampled(*tensors, level_hw)


def _sampled(value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: LevelSizes) -> Tensor:
    """The PyTorch implementation."""
    locations = reference_points[:, :, None, None, None] + sampling_offsets / level_wh(level_hw, sampling_offsets)
    return weighted_samples(value, level_hw, locations, joint_softmax(attention_logits))


def weighted_samples(value: Tensor, level_hw: LevelSizes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum (B, Q, M * C) of bilinear samples.

    Samples of value (B, S, M, C) are taken at locations (B, Q, M, L, P, 2), as (x, y) in 0..1, and have weights (B, Q, M, L, P).
    """
    B, _, M, C = value.shape
    Q = locations.shape[1]
    sizes = [h * w for h, w in level_hw]
    grid = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B*M, Q, P, 2)
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, B*M, 1, Q, P)
    out = value.new_zeros(B * M, C, Q)
    # One level after the other, because the samples of all levels together would be the largest tensor of the network.
    for (h, w), level, points, weight in zip(level_hw, value.split(sizes, dim=1), grid, weights, strict=True):
        image = level.permute(0, 2, 3, 1).reshape(B * M, C, h, w)
        out = out + (F.grid_sample(image, points, align_corners=False) * weight).sum(-1)  # (B*M, C, Q, P) summed over P
    return out.view(B, M * C, Q).transpose(1, 2)


def joint_softmax(logits: Tensor) -> Tensor:
    """Softmax of `logits` (..., L, P) over the last two axes together."""
    return logits.flatten(-2).softmax(-1).view_as(logits)


def level_wh(level_hw: LevelSizes, like: Tensor) -> Tensor:
    """(L, 1, 2) width and height of each level, to divide offsets of shape (..., L, P, 2)."""
    return torch.tensor([(w, h) for h, w in level_hw], dtype=like.dtype, device=like.device)[:, None]


def check_levels(num_keys: int, level_hw: LevelSizes) -> None:
    """Raise ValueError unless levels of these sizes have `num_keys` keys in all."""
    total = sum(h * w for h, w in level_hw)
    if total != num_keys:
        raise ValueError(f"level_hw {list(level_hw)} covers {total} keys, value has {num_keys}; give the level sizes of the keys")


@library.custom_op("qdbev::multi_scale_deformable_attention", mutates_args=())
def _node(value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor, level_hw: Sequence[int]) -> Tensor:
    pairs = list(zip(level_hw[::2], level_hw[1::2], strict=True))
    return _sampled(value, reference_points, sampling_offsets, attention_logits, pairs).contiguous()


@_node.register_fake
def _(value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, *_: Any) -> Tensor:
    B, _, M, C = value.shape
    return value.new_empty(B, sampling_offsets.shape[1], M * C)
