"""Every operator against its equation in loops (float64) and against the official code's numbers."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from golden_inputs import DCN_SHAPES, fill_value, make_dcn_inputs, make_msda_inputs, make_rotate_input
from torch import Tensor, library

from qdbev.ops.deform_conv import DeformConv2d
from qdbev.ops.msda import multi_scale_deformable_attention, weighted_samples
from qdbev.ops.rotate import rotate_bev
from qdbev.ops.sca import dense_spatial_cross_attention, spatial_cross_attention

LEVELS = [(5, 7), (3, 4)]


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """(C,) bilinear sample of an (H, W, C) image at (x, y), 0 to 1 between its outer corners; zero outside."""
    H, W, C = image.shape
    column, row = x * W - 0.5, y * H - 0.5
    read = torch.zeros(C, dtype=image.dtype)
    for dy, dx in product((0, 1), (0, 1)):
        r, c = math.floor(row) + dy, math.floor(column) + dx
        if 0 <= r < H and 0 <= c < W:
            read += image[r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return read


def msda_in_loops(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, level_hw: list[tuple[int, int]]) -> Tensor:
    B, _, M, C = value.shape
    Q, P = offsets.shape[1], offsets.shape[4]
    out = torch.zeros(B, Q, M * C, dtype=value.dtype)
    starts = np.cumsum([0] + [h * w for h, w in level_hw])
    for b, q, m in product(range(B), range(Q), range(M)):
        weights = logits[b, q, m].flatten().softmax(0).view(len(level_hw), P)
        for (level, (h, w)), p in product(enumerate(level_hw), range(P)):
            image = value[b, starts[level] : starts[level + 1], m].view(h, w, C)
            x, y = (reference[b, q] + offsets[b, q, m, level, p] / torch.tensor([w, h])).tolist()
            out[b, q, m * C : (m + 1) * C] += weights[level, p] * bilinear(image, x, y)
    return out


def sca_in_loops(
    value: Tensor, reference: Tensor, visible: Tensor, offsets: Tensor, logits: Tensor, level_hw: list[tuple[int, int]]
) -> Tensor:
    B, N = value.shape[:2]
    Q, P, D = offsets.shape[1], offsets.shape[4], reference.shape[3]
    out = torch.zeros(B, Q, value.shape[3] * value.shape[4], dtype=value.dtype)
    for b, q in product(range(B), range(Q)):
        cameras = [n for n in range(N) if visible[b, n, q] > 0]
        for n in cameras:
            # One reference for each point: fold it into the offsets of a problem whose own reference is zero.
            scale = torch.tensor([(w, h) for h, w in level_hw], dtype=value.dtype).view(1, -1, 1, 2)
            pillar = reference[b, n, q][[p % D for p in range(P)]]
            shifted = offsets[b, q] + pillar * scale
            read = msda_in_loops(value[b : b + 1, n], torch.zeros(1, 1, 2), shifted[None, None], logits[b : b + 1, q : q + 1], level_hw)
            out[b, q] += read[0, 0] / len(cameras)
    return out


def msda_problem(B: int = 2, Q: int = 5, spread: float = 4.0) -> tuple:
    g = torch.Generator().manual_seed(Q)
    S, M, C, P = sum(h * w for h, w in LEVELS), 2, 3, 4
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    reference = torch.rand(B, Q, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
    return normal(B, S, M, C), reference, spread * normal(B, Q, M, len(LEVELS), P, 2), normal(B, Q, M, len(LEVELS), P), LEVELS


def sca_problem(B: int = 2, N: int = 3, Q: int = 6, levels: list[tuple[int, int]] = LEVELS) -> tuple:
    g = torch.Generator().manual_seed(N)
    S, M, C, P, D = sum(h * w for h, w in levels), 2, 3, 8, 4
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    reference = torch.rand(B, N, Q, D, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
    visible = (torch.rand(B, N, Q, generator=g) < 0.5).double()
    visible[0, :, 0] = 0  # seen by no camera
    visible[0, :, 1 % Q] = 1  # seen by all
    return normal(B, N, S, M, C), reference, visible, 3 * normal(B, Q, M, len(levels), P, 2), normal(B, Q, M, len(levels), P), levels


def sca_seen_by(share: float) -> tuple:
    """A problem in which no camera (0) or every camera (1) sees every query."""
    value, reference, visible, *rest = sca_problem()
    return value, reference, torch.full_like(visible, share), *rest


def sca_far_outside() -> tuple:
    value, reference, *rest = sca_problem()
    return value, reference * 1e6, *rest


SCA_PROBLEMS = {
    "random": sca_problem,
    "seen by none": lambda: sca_seen_by(0),
    "seen by all": lambda: sca_seen_by(1),
    "one query": lambda: sca_problem(B=1, Q=1),
    "one camera": lambda: sca_problem(N=1),
    "one level": lambda: sca_problem(levels=[(5, 7)]),
    "four levels": lambda: sca_problem(levels=[(8, 12), (4, 6), (2, 3), (1, 2)]),
    "far outside": sca_far_outside,
}
SCA_FORMS = [spatial_cross_attention, dense_spatial_cross_attention]


def output_and_gradients(form: Callable, problem: tuple, dtype: torch.dtype) -> list[Tensor]:
    """Output of a form, and gradients of value, reference points, offsets and logits for a loss with different weights."""
    tensors, levels = [tensor.to(dtype) for tensor in problem[:-1]], problem[-1]
    learned = [tensors[index].requires_grad_() for index in (0, 1, 3, 4)]
    out = form(*tensors, levels)
    return [out, *torch.autograd.grad((out * torch.linspace(-1, 2, out.numel(), dtype=dtype).view_as(out)).sum(), learned)]


@pytest.mark.parametrize("num_query", [1, 5])
def test_deformable_attention_equals_its_equation_in_loops(num_query):
    problem = msda_problem(Q=num_query)
    torch.testing.assert_close(multi_scale_deformable_attention(*problem), msda_in_loops(*problem), atol=1e-12, rtol=0)


def test_deformable_attention_equals_the_official_numbers(golden_modules):
    given = make_msda_inputs()
    value, locations, weights = (torch.from_numpy(given[name]) for name in ("value", "locations", "weights"))
    out = weighted_samples(value, [tuple(hw) for hw in given["level_hw"].tolist()], locations, weights)
    np.testing.assert_allclose(out.numpy(), golden_modules["msda_out"], atol=1e-5)


def test_points_far_outside_read_zero():
    value, _, offsets, logits, levels = msda_problem()
    out = multi_scale_deformable_attention(value, torch.full((2, 5, 2), 50.0, dtype=torch.float64), offsets, logits, levels)
    assert not out.any()


def test_deformable_attention_has_the_gradient_of_its_equation():
    value, reference, offsets, logits, levels = msda_problem(B=1, Q=2, spread=0.3)
    inputs = [tensor.requires_grad_() for tensor in (value, reference, offsets, logits)]
    assert torch.autograd.gradcheck(lambda *args: multi_scale_deformable_attention(*args, levels), inputs, atol=1e-6)


def test_levels_that_do_not_cover_the_keys_are_refused():
    value, reference, offsets, logits, _ = msda_problem()
    with pytest.raises(ValueError, match=r"covers 39 keys, value has 47"):
        multi_scale_deformable_attention(value, reference, offsets, logits, [(5, 7), (2, 2)])


@pytest.mark.parametrize("form", SCA_FORMS)
@pytest.mark.parametrize("name", SCA_PROBLEMS)
def test_both_forms_of_spatial_cross_attention_equal_its_equation_in_loops(form, name):
    problem = SCA_PROBLEMS[name]()
    torch.testing.assert_close(form(*problem), sca_in_loops(*problem), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])  # a few hundred roundings each
@pytest.mark.parametrize("name", SCA_PROBLEMS)
def test_both_forms_of_spatial_cross_attention_have_the_same_gradients(name, dtype, tolerance):
    gathered, dense = (output_and_gradients(form, SCA_PROBLEMS[name](), dtype) for form in SCA_FORMS)
    for ours, theirs in zip(gathered, dense, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", SCA_FORMS)
def test_both_forms_of_spatial_cross_attention_have_the_gradient_of_their_equation(form):
    value, reference, visible, offsets, logits, levels = sca_problem(B=1, N=2, Q=2)
    inputs = [tensor.requires_grad_() for tensor in (value, reference, offsets * 0.1, logits)]
    run = lambda value, reference, offsets, logits: form(value, reference, visible, offsets, logits, levels)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6)


def test_spatial_cross_attention_with_no_camera_seeing_anything_is_zero():
    value, reference, visible, *rest = sca_problem()
    assert not spatial_cross_attention(value, reference, torch.zeros_like(visible), *rest).any()


def test_spatial_cross_attention_gives_each_sample_of_a_batch_what_it_gives_it_alone():
    *tensors, levels = sca_problem()
    together = spatial_cross_attention(*tensors, levels)
    for sample in range(2):
        alone = spatial_cross_attention(*(tensor[sample : sample + 1] for tensor in tensors), levels)
        torch.testing.assert_close(together[sample : sample + 1], alone, atol=1e-12, rtol=0)


def test_sampling_points_that_cannot_be_shared_among_the_pillar_points_are_refused():
    value, reference, visible, offsets, logits, levels = sca_problem()
    with pytest.raises(ValueError, match="7 sampling points cannot be shared among 4"):
        spatial_cross_attention(value, reference, visible, offsets[..., :7, :], logits[..., :7], levels)


@pytest.mark.parametrize(("op", "problem"), [("multi_scale_deformable_attention", msda_problem), ("spatial_cross_attention", sca_problem)])
def test_the_exported_node_computes_and_declares_what_the_function_does(op, problem):
    *tensors, levels = problem()
    flat = [size for hw in levels for size in hw]
    library.opcheck(getattr(torch.ops.qdbev, op).default, (*tensors, flat), test_utils=("test_schema", "test_faketensor"))


def test_rotation_equals_the_official_numbers(golden_modules):
    given = make_rotate_input()
    bev = torch.from_numpy(given).flatten(1).T[None]
    for (angle, cx, cy), golden in zip(golden_modules["rotate_cases"], golden_modules["rotate_out"], strict=True):
        out = rotate_bev(bev, torch.tensor([angle]), (20, 20), (float(cx), float(cy)))
        np.testing.assert_array_equal(out[0].T.reshape(3, 20, 20).numpy(), golden)


def test_each_sample_of_a_batch_is_rotated_by_its_own_angle():
    bev = torch.randn(2, 20 * 20, 3)
    angles = torch.tensor([20.0, -35.0])
    together = rotate_bev(bev, angles, (20, 20), (10.0, 10.0))
    for sample in range(2):
        torch.testing.assert_close(
            together[sample], rotate_bev(bev[sample : sample + 1], angles[sample : sample + 1], (20, 20), (10.0, 10.0))[0]
        )


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_convolution_equals_the_official_numbers(golden_modules, stride):
    layer = DeformConv2d(16, 24, stride)
    weights = {name: torch.from_numpy(fill_value(name, shape)) for name, shape in DCN_SHAPES.items()}
    with torch.no_grad():
        layer.product.weight.copy_(weights["dcn.weight"].flatten(1)[..., None, None])
        layer.offset.weight.copy_(weights["dcn.conv_offset.weight"])
        layer.offset.bias.copy_(weights["dcn.conv_offset.bias"])
        out = layer(torch.from_numpy(make_dcn_inputs()))
    np.testing.assert_allclose(out.numpy(), golden_modules[f"dcn_out_stride{stride}"], atol=2e-5)
