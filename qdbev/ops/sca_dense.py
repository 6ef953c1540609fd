"""Spatial cross-attention with static shapes: each camera computes every query, and queries that it does not see are masked.

This is the form that the ONNX body computes (export/bodies/attention.py), written in PyTorch. The network uses the gathered form of
qdbev/ops/sca.py, which is several times cheaper. The tests and bench/attention_cost.py compare the two, and gradients of the CUDA kernel
are computed through this form (plugins/torch_ops.py). Source: BEVFormer (arXiv:2203.17270), equation 3. Shape letters are those of
qdbev/ops/sca.py.
"""

from collections.abc import Sequence

from torch import Tensor

from qdbev.ops.msda import joint_softmax, level_wh, weighted_samples


def dense_spatial_cross_attention(
    value: Tensor,
    reference_points: Tensor,
    visible: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    level_hw: Sequence[tuple[int, int]],
) -> Tensor:
    """Compute one camera after the other, so that the samples of only one camera are in memory at a time.

    Arguments and result are those of `qdbev.ops.sca.spatial_cross_attention`.
    """
    B, N, _, M, C = value.shape
    Q, L, P = sampling_offsets.shape[1], sampling_offsets.shape[3], sampling_offsets.shape[4]
    D = reference_points.shape[-2]
    offsets = (sampling_offsets / level_wh(level_hw, sampling_offsets)).unflatten(4, (P // D, D))  # (B, Q, M, L, P/D, D, 2)
    weights = joint_softmax(attention_logits)
    total = value.new_zeros(B, Q, M * C)
    for camera in range(N):
        pillars = reference_points[:, camera, :, None, None, None]  # (B, Q, 1, 1, 1, D, 2)
        locations = (offsets + pillars).view(B, Q, M, L, P, 2)
        total = total + weighted_samples(value[:, camera], level_hw, locations, weights) * visible[:, camera, :, None]
    return total / visible.sum(1).clamp(min=1)[..., None]
