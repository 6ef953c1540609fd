"""Compare the attention kernels, compiled as host C++, with the equation in loops and with the PyTorch operators."""

import dataclasses
import math
import mmap
from itertools import product

import numpy as np
import pytest
import torch
from kernel_on_host import HostKernels
from torch import Generator, Tensor

from plugins.attention.cases import SIZES, Case, draw, edge_cases, error_ratio, random_cases
from plugins.attention.variant import TYPES
from plugins.kernel import Types

WIDE = dataclasses.replace(SIZES[4], level_hw=((3, 200),))
"""Sizes with a level as wide as the widest level of the recipe base."""
LARGE = dataclasses.replace(SIZES[0], value="int8", num_heads=8, num_points=4, level_hw=((2800, 2900),))
"""Sizes at which the keys of one camera take 2.08e9 bytes."""

NORESERVE = 0x4000
"""Linux's MAP_NORESERVE, which reserves address space without memory; newer Pythons have it in mmap."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    variants = [draw("", sizes, Generator()).in_types(types)[0] for sizes in SIZES for types in TYPES]
    return HostKernels([*variants, WIDE, LARGE], tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def edges() -> list[Case]:
    return list(edge_cases())


def compute(kernels: HostKernels, case: Case, types: Types) -> tuple[Tensor, Tensor, float]:
    """Return the output of the kernel, the output of the PyTorch operator, and the scale of `value`."""
    variant, value, scale = case.in_types(types)
    return kernels.attend(variant, value, scale, case.others(), case.row_length), case.truth(value, scale), scale


def worst(kernels: HostKernels, cases: list[Case], types: Types) -> tuple[float, str]:
    """Return the largest error as a share of the permitted error, and the name of its case."""
    found = []
    for case in cases:
        out, truth, scale = compute(kernels, case, types)
        found.append((error_ratio(types[0], scale, out, truth), case.name))
    return max(found)


def in_loops(case: Case) -> np.ndarray:
    """Compute the equation in float64, one number after the other."""
    names = [case.value, case.reference_points, case.sampling_offsets, case.attention_logits]
    value, reference, offsets, logits = (tensor.double().numpy() for tensor in names)
    if case.visible is None:
        value, reference, visible = value[:, None], reference[:, None, :, None], np.ones((len(value), 1, offsets.shape[1]))
    else:
        visible = case.visible.double().numpy()
    B, N = value.shape[:2]
    _, Q, M, L, P, _ = offsets.shape
    out = np.zeros((B, Q, M, value.shape[-1]))
    for b, q, m, n in product(range(B), range(Q), range(M), range(N)):
        if visible[b, n, q] == 0:
            continue
        weights = np.exp(logits[b, q, m] - logits[b, q, m].max())
        weights *= visible[b, n, q] / max(visible[b, :, q].sum(), 1) / weights.sum()
        first = 0
        for level, (height, width) in enumerate(case.variant.level_hw):
            for p in range(P):
                u, v = reference[b, n, q, p % reference.shape[3]] + offsets[b, q, m, level, p] / (width, height)
                column, row = u * width - 0.5, v * height - 0.5
                for r, c in product((math.floor(row), math.floor(row) + 1), (math.floor(column), math.floor(column) + 1)):
                    if 0 <= r < height and 0 <= c < width:
                        share = (1 - abs(row - r)) * (1 - abs(column - c))
                        out[b, q, m] += weights[level, p] * share * value[b, n, first + r * width + c, m]
            first += height * width
    return out.reshape(B, Q, -1)


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_a_kernel_equals_the_equation_in_loops(kernels, index):
    case = draw("", SIZES[index], Generator().manual_seed(5), num_query=4)
    out, _, _ = compute(kernels, case, ("float32", "float32"))
    np.testing.assert_allclose(out.numpy(), in_loops(case), atol=1e-5)


@pytest.mark.parametrize("types", TYPES)
def test_a_kernel_equals_the_pytorch_operator_on_a_thousand_random_problems(kernels, types):
    share, name = worst(kernels, list(random_cases(1000)), types)
    assert share <= 1, f"{name}: {share:.2f} times the permitted error"


@pytest.mark.parametrize("types", TYPES)
def test_a_kernel_equals_the_pytorch_operator_on_every_edge(kernels, edges, types):
    share, name = worst(kernels, edges, types)
    assert share <= 1, f"{name}: {share:.2f} times the permitted error"


def test_positions_in_the_widest_level_of_base_are_exact_to_the_tolerance(kernels):
    case = draw("", WIDE, Generator().manual_seed(0), num_query=200)
    share, _ = worst(kernels, [case], ("float32", "float32"))
    assert share <= 1


def test_int8_errs_by_the_rounding_of_its_weights_alone(kernels):
    for seed in range(20):
        case = draw("", SIZES[0], Generator().manual_seed(seed), num_query=11)
        out, truth, scale = compute(kernels, case, ("int8", "float32"))  # without the rounding of a float16 output
        # 64 corners and up to three cameras, each weight rounded by up to 1 / 131070 and times up to 127; rarely all in one direction
        assert float((out - truth).abs().max()) < 0.02 * scale


@pytest.mark.parametrize("sizes", SIZES)
def test_nothing_outside_the_levels_and_of_other_cameras_is_read(kernels, edges, sizes):
    names = ("points one cell before the first", "points half a cell after the last", "references at 1e30", "all inside")
    cases = [case for case in edges if case.variant == sizes and case.name.startswith(names)]
    assert len(cases) == len(names)
    for case in [*cases, draw("", sizes, Generator().manual_seed(3), num_query=40)]:
        truth = case.truth(case.value, 1.0)
        value = case.value.clone()
        if case.visible is not None:
            unseen = case.visible.sum(2) == 0  # (B, N)
            value[unseen] = torch.nan
        room = torch.full((value.numel() + 8192,), torch.nan)
        room[4096:-4096] = value.flatten()
        out = kernels.attend(sizes, room[4096:-4096].view_as(value), 1.0, case.others())
        torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=0)


def test_a_camera_that_lies_beyond_four_gigabytes_is_read(kernels):
    N, (height, width) = 3, LARGE.level_hw[0]
    size = N * LARGE.num_keys * 256
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE) as memory:
        value = torch.frombuffer(memory, dtype=torch.int8).view(1, N, LARGE.num_keys, 8, 32)
        last = torch.randint(-128, 128, (8, 32), generator=Generator().manual_seed(0), dtype=torch.int8)
        value[0, 2, -1] = last
        points = torch.tensor([1 - 0.5 / width, 1 - 0.5 / height]).expand(1, N, 1, 4, 2)
        others = [points, torch.tensor([0.0, 0.0, 1.0]).view(1, N, 1), torch.zeros(1, 1, 8, 1, 4, 2), torch.zeros(1, 1, 8, 1, 4)]
        out = kernels.attend(LARGE, value, 1.0, others)
        del value
    # float32 positions in a level this wide are off by up to 1 / 8192 of a cell
    torch.testing.assert_close(out.view(8, 32), last.float(), atol=0.2, rtol=0)


@pytest.mark.parametrize("types", TYPES)
def test_the_order_of_computation_changes_no_number(kernels, types):
    case = draw("", SIZES[2], Generator().manual_seed(8), batch=1, num_query=72)
    variant, value, scale = case.in_types(types)
    plain = kernels.attend(variant, value, scale, case.others())
    for row_length in (1, 6, 8, 9, 36, 72):
        assert torch.equal(kernels.attend(variant, value, scale, case.others(), row_length), plain)


@pytest.mark.parametrize(("num_query", "row_length"), [(40000, 200), (625, 25), (72, 9), (5, 5), (7, 1), (900, 0)])
def test_every_query_has_its_turn(kernels, num_query, row_length):
    assert sorted(kernels.query_at(order, num_query, row_length) for order in range(num_query)) == list(range(num_query))


def test_a_block_of_a_grid_is_a_square_of_neighbours(kernels):
    rows, columns = zip(*(divmod(kernels.query_at(order, 40000, 200), 200) for order in range(64)), strict=True)
    assert set(rows) == set(columns) == set(range(8))
