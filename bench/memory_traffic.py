"""Count the bytes that spatial cross-attention reads and writes, and its operations. plugins/README.md has the formulas.

Letters as in qdbev/ops/sca.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from plugins.attention.variant import Variant
from qdbev.ops.msda import level_wh

SECTOR_BYTES = 32
"""Smallest number of bytes that a GPU's caches transfer."""


@dataclass(frozen=True)
class Traffic:
    """Memory traffic and arithmetic of one launch of spatial cross-attention."""

    bytes_once: int
    """Bytes if every input is read once and the output is written once."""
    gathered_bytes: int
    """Bytes of the cache sectors of all corners that are read; a corner that is read twice counts twice."""
    operations: int
    """Multiplications and additions of the weighted sums: two per corner and channel."""


def traffic(variant: Variant, batch: int, num_cameras: int, num_query: int, corners: int) -> Traffic:
    """Count the traffic of one launch that reads `corners` corners in all, as `corners_inside` counts them."""
    B, N, Q, M, C = batch, num_cameras, num_query, variant.num_heads, variant.channels
    samples = len(variant.level_hw) * variant.num_points
    out_bytes = 4 if variant.out == "float32" else 2
    value = B * N * variant.num_keys * M * C * variant.value_bytes
    geometry = B * N * Q * (2 * variant.num_pillar_points + 1) * 4  # reference points and visible
    query = B * Q * M * samples * 3 * 4  # offsets and logits
    sectors = -(-C * variant.value_bytes // SECTOR_BYTES)
    return Traffic(
        bytes_once=value + geometry + query + B * Q * M * C * out_bytes,
        gathered_bytes=corners * sectors * SECTOR_BYTES,
        operations=2 * corners * C,
    )


def corners_inside(reference_points: Tensor, visible: Tensor, sampling_offsets: Tensor, level_hw: Sequence[tuple[int, int]]) -> int:
    """Count the corners inside their level, over all samples, queries, cameras that see them, heads, levels and points.

    Args:
        reference_points: (B, N, Q, D, 2) as (u, v) in 0..1.
        visible: (B, N, Q), positive where the camera sees the query.
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y) in cells of each level.
        level_hw: Height and width of each level, in cells.
    """
    D, P = reference_points.shape[3], sampling_offsets.shape[4]
    size = level_wh(level_hw, sampling_offsets)  # (L, 1, 2)
    total = 0
    for camera in range(visible.shape[1]):
        sample, query = (visible[:, camera] > 0).nonzero(as_tuple=True)
        pillars = reference_points[sample, camera, query].repeat(1, P // D, 1)[:, None, None]  # (K, 1, 1, P, 2)
        low = (pillars * size + sampling_offsets[sample, query] - 0.5).floor()  # (K, M, L, P, 2)
        inside = ((low >= 0) & (low < size)).long() + ((low >= -1) & (low < size - 1)).long()  # 0, 1 or 2 cells along each axis
        total += int(inside.prod(-1).sum())
    return total
