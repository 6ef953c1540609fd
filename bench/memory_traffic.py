"""What spatial cross-attention has to move and compute, counted. Letters as in qdbev/ops/sca.py; plugins/README.md has the formulas.

`cost` counts from sizes and two averages, `corners_inside` on given tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from plugins.variant import Variant
from qdbev.ops.msda import level_wh

SECTOR_BYTES = 32
"""What a GPU's caches move at least."""


@dataclass(frozen=True)
class Cost:
    """Of one launch."""

    bytes_once: int
    """Every input read once, the output written once."""
    gathered_bytes: int
    """Corners read, in whole sectors, each time one is asked for."""
    operations: int
    """Multiplications and additions of the weighted sum, two for each corner and channel."""


def cost(variant: Variant, batch: int, num_cameras: int, num_query: int, corners: int) -> Cost:
    """`corners`: how many are read, over all queries, cameras that see them, heads and points."""
    B, N, Q, M, C = batch, num_cameras, num_query, variant.num_heads, variant.channels
    samples = len(variant.level_hw) * variant.num_points
    out_bytes = 4 if variant.out == "float32" else 2
    value = B * N * variant.num_keys * M * C * variant.value_bytes
    geometry = B * N * Q * (2 * variant.num_pillar_points + 1) * 4  # reference points and visible
    query = B * Q * M * samples * 3 * 4  # offsets and logits
    sectors = -(-C * variant.value_bytes // SECTOR_BYTES)
    return Cost(
        bytes_once=value + geometry + query + B * Q * M * C * out_bytes,
        gathered_bytes=corners * sectors * SECTOR_BYTES,
        operations=2 * corners * C,
    )


def corners_inside(reference_points: Tensor, visible: Tensor, sampling_offsets: Tensor, level_hw: Sequence[tuple[int, int]]) -> int:
    """Corners that lie inside their level, over all queries, cameras that see them, heads, levels and points."""
    D, P = reference_points.shape[3], sampling_offsets.shape[4]
    size = level_wh(level_hw, sampling_offsets)  # (L, 1, 2)
    total = 0
    for camera in range(visible.shape[1]):
        sample, query = (visible[:, camera] > 0).nonzero(as_tuple=True)
        pillars = reference_points[sample, camera, query].repeat(1, P // D, 1)[:, None, None]  # (K, 1, 1, P, 2)
        low = (pillars * size + sampling_offsets[sample, query] - 0.5).floor()  # (K, M, L, P, 2)
        inside = ((low >= 0) & (low < size)).long() + ((low >= -1) & (low < size - 1)).long()  # of the two along each axis
        total += int(inside.prod(-1).sum())
    return total
