"""Test cases for the attention kernels: random problems and all edge cases of plugins/README.md, with the result of PyTorch.

tests/test_plugins_kernels.py runs them on kernels compiled for the host, bench/kernels.py on a GPU. Letters as in qdbev/ops/sca.py.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from plugins.attention.variant import Variant
from plugins.kernel import Types, ValueType
from qdbev.ops.contract import MSDA, SCA
from qdbev.ops.msda import multi_scale_deformable_attention
from qdbev.ops.sca import spatial_cross_attention

_ATOL: dict[ValueType, float] = {"float32": 1e-5, "float16": 2e-3, "int8": 1.0}
"""Largest permitted absolute error for each number type of `value`; for int8 in steps of its scale, plus the rounding of the output."""
_SAMPLES = 8
"""Batch size of the random cases, so that one launch computes several problems."""


def _variant(heads: int, channels: int, points: int, pillars: int | None, *level_hw: tuple[int, int]) -> Variant:
    sizes = {"num_heads": heads, "channels": channels, "num_points": points, "num_pillar_points": pillars or 1, "level_hw": level_hw}
    return Variant(operator=SCA if pillars else MSDA, value="float32", out="float32", **sizes)


SIZES = (
    _variant(2, 32, 8, 4, (5, 7), (3, 4)),
    _variant(1, 16, 4, 4, (6, 9)),  # one level, P = D
    _variant(2, 8, 8, 4, (8, 12), (4, 6), (2, 3), (1, 2)),  # four levels, P = 2 D
    _variant(2, 32, 3, 3, (4, 1), (1, 5)),  # levels one cell wide and one cell high
    _variant(8, 32, 4, None, (9, 11)),
    _variant(3, 4, 5, None, (5, 7), (1, 1)),
)
"""Sizes of all cases, as float32 kernels. There are few, because each takes time to compile."""


@dataclass(frozen=True)
class Case:
    """Inputs of one attention in float32."""

    name: str
    variant: Variant
    """The float32 kernel of these sizes."""
    value: Tensor
    """(B, N, S, M, C) in spatial cross-attention, (B, S, M, C) in multi-scale deformable attention."""
    reference_points: Tensor
    """(B, N, Q, D, 2) in spatial cross-attention, (B, Q, 2) in multi-scale deformable attention."""
    visible: Tensor | None
    """(B, N, Q) in spatial cross-attention, None in multi-scale deformable attention."""
    sampling_offsets: Tensor
    """(B, Q, M, L, P, 2)"""
    attention_logits: Tensor
    """(B, Q, M, L, P)"""
    row_length: int = 0
    """The kernel's argument `row_length` when it runs on the host."""

    def in_types(self, types: Types) -> tuple[Variant, Tensor, float]:
        """Return the kernel for these number types, `value` in its type, and the scale of `value` (1 if it is not int8).

        The scale is exact in float16. Values below -128 steps are clipped.
        """
        number, out = types
        variant = dataclasses.replace(self.variant, value=number, out=out)
        if number != "int8":
            return variant, self.value.to(getattr(torch, number)), 1.0
        scale = float((self.value.max().clamp(min=1e-3) / 127).half())
        return variant, (self.value / scale).round().clamp(-128, 127).to(torch.int8), scale

    def truth(self, value: Tensor, scale: float) -> Tensor:
        """Return the result (B, Q, M * C) of the PyTorch operator in float64, for `value` and `scale` as `in_types` returns them."""
        operator = spatial_cross_attention if self.variant.spatial else multi_scale_deformable_attention
        return operator(value.double() * scale, *(tensor.double() for tensor in self.others()), self.variant.level_hw)

    def others(self) -> list[Tensor]:
        """Return the inputs after `value`, in the operator's order and without `value_scale`."""
        rest = [self.reference_points, self.visible, self.sampling_offsets, self.attention_logits]
        return [tensor for tensor in rest if tensor is not None]


def operator_inputs(variant: Variant, value: Tensor, scale: float, others: Sequence[Tensor]) -> list[Tensor]:
    """Return all inputs of the operator that `variant` computes, in its order: with `value_scale` if `value` is int8."""
    value_scale = torch.tensor(scale, dtype=getattr(torch, variant.out), device=value.device)
    return [value, *[value_scale] * variant.form.has_integer_value, *others]


def level_attribute(variant: Variant) -> dict[str, list[int]]:
    """Return the operator's attribute `level_hw`: h0, w0, h1, w1, ..."""
    return {"level_hw": [size for hw in variant.level_hw for size in hw]}


def error_ratio(number: ValueType, scale: float, out: Tensor, truth: Tensor) -> float:
    """Return the largest error of a kernel's output divided by the permitted error; infinite if the output is not a number."""
    permitted: Tensor | float = _ATOL[number]
    if number == "int8":
        permitted = permitted * scale + truth.abs() * 2**-11 * (out.dtype == torch.float16)
    share = (out.double() - truth).abs() / permitted
    return float(torch.nan_to_num(share, nan=torch.inf).max()) if share.numel() else 0.0


def random_cases(count: int) -> Iterator[Case]:
    """Yield cases with at least `count` random problems in all, over all SIZES. A third of the sampling points are outside the levels."""
    for seed in range(-(-count // _SAMPLES)):
        generator = Generator().manual_seed(seed)
        num_query = int(torch.randint(1, 12, (), generator=generator))
        num_cameras = int(torch.randint(1, 7, (), generator=generator))
        yield draw(f"random {seed}", SIZES[seed % len(SIZES)], generator, _SAMPLES, num_query, num_cameras)


def draw(name: str, sizes: Variant, generator: Generator, batch: int = 2, num_query: int = 6, num_cameras: int = 3) -> Case:
    """Return a random case. In its first sample, no camera sees the first query and all cameras see the last one."""
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    B, N, Q, M, L, P = batch, num_cameras, num_query, sizes.num_heads, len(sizes.level_hw), sizes.num_points
    offsets, logits = 3 * normal(B, Q, M, L, P, 2), 2 * normal(B, Q, M, L, P)
    if not sizes.spatial:
        value, points = normal(B, sizes.num_keys, M, sizes.channels), uniform(B, Q, 2) * 1.4 - 0.2
        return Case(name, sizes, value, points, None, offsets, logits)
    visible = (uniform(B, N, Q) < 0.4).float()
    visible[0, :, 0], visible[0, :, -1] = 0, 1
    value, points = normal(B, N, sizes.num_keys, M, sizes.channels), uniform(B, N, Q, sizes.num_pillar_points, 2) * 1.4 - 0.2
    return Case(name, sizes, value, points, visible, offsets, logits)


def edge_cases() -> Iterator[Case]:
    """Yield every edge case for every entry of SIZES to which it applies."""
    for index, sizes in enumerate(SIZES):
        generator = Generator().manual_seed(1000 + index)
        for name, change in _EDGES.items():
            yield change(draw(f"{name}, sizes {index}", sizes, generator))
        for num_query, row_length in ((1, 0), (1, 1), (67, 0), (300, 0), (36, 6), (289, 17), (110, 11)):
            case = draw(f"{num_query} queries, rows of {row_length}, sizes {index}", sizes, generator, 1, num_query)
            yield dataclasses.replace(case, row_length=row_length)
        if sizes.spatial:
            yield draw(f"one camera, sizes {index}", sizes, generator, num_cameras=1)
            yield draw(f"32 cameras, sizes {index}", sizes, generator, batch=1, num_query=3, num_cameras=32)
            for name, change in _VISIBILITIES.items():
                yield change(draw(f"{name}, sizes {index}", sizes, generator))


def _with(**changes: Callable[[Tensor], Tensor]) -> Callable[[Case], Case]:
    """Replace tensors of a case, each by a function of itself."""
    return lambda case: dataclasses.replace(case, **{name: change(getattr(case, name)) for name, change in changes.items()})


def _points_at(cell: Callable[[int], float]) -> Callable[[Case], Case]:
    """Put every sampling point of every level at column cell(width) and row cell(height); 0 is the center of the first cell."""

    def change(case: Case) -> Case:
        offsets = torch.empty_like(case.sampling_offsets)
        for level, (height, width) in enumerate(case.variant.level_hw):
            offsets[:, :, :, level, :, 0], offsets[:, :, :, level, :, 1] = cell(width) + 0.5, cell(height) + 0.5
        return dataclasses.replace(case, sampling_offsets=offsets, reference_points=torch.zeros_like(case.reference_points))

    return change


def _every_other_far(offsets: Tensor) -> Tensor:
    """Move every other sampling point to +-1e30."""
    offsets = offsets.clone()
    offsets[..., ::2, :] = offsets[..., ::2, :].sign() * 1e30
    return offsets


_EDGES: dict[str, Callable[[Case], Case]] = {
    "points half a cell before the first": _points_at(lambda size: -0.5),
    "points one cell before the first": _points_at(lambda size: -1.0),
    "points on the first cell": _points_at(lambda size: 0.0),
    "points on the last cell": _points_at(lambda size: size - 1.0),
    "points half a cell after the last": _points_at(lambda size: size - 0.5),
    "points one cell after the last": _points_at(float),
    "points between cells": _points_at(lambda size: size / 2 - 0.25),
    "all inside": _with(reference_points=lambda points: points * 0.0, sampling_offsets=lambda offsets: offsets * 0.0),
    "references at a million": _with(reference_points=lambda points: points * 1e6),
    "references at 1e30": _with(reference_points=lambda points: points * 1e30),
    "offsets at 1e30": _with(sampling_offsets=lambda offsets: offsets * 1e30),
    "references and offsets at 1e30": _with(reference_points=lambda points: points * 1e30, sampling_offsets=lambda offsets: offsets * 1e30),
    "every other point at 1e30": _with(reference_points=lambda points: torch.full_like(points, 0.5), sampling_offsets=_every_other_far),
    "largest and smallest values": _with(value=torch.sign),
    "int8 at both ends of its range": _with(value=lambda value: torch.where(value > 0, 127 / 128, -1.0)),
    "equal logits": _with(attention_logits=torch.zeros_like),
    "huge logits": _with(attention_logits=lambda logits: logits * 1e4),
    "logits far below zero": _with(attention_logits=lambda logits: logits - 1e4),
}
"""Changes to a random case that turn it into an edge case, by description."""
_VISIBILITIES: dict[str, Callable[[Case], Case]] = {
    "seen by none": _with(visible=torch.zeros_like),
    "seen by all": _with(visible=torch.ones_like),
    "seen in part": _with(visible=lambda visible: visible * 0.3),
    "seen more than once": _with(visible=lambda visible: visible * 2.5),
}
"""The same for cases of spatial cross-attention."""
