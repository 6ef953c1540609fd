"""Test the operators in PyTorch on a real GPU: registration, gradients, streams, CUDA graphs. test_plugins_torch.py needs no GPU."""

import pytest
import torch
from torch import Generator, Tensor, library

from plugins.attention.cases import SIZES, Case, draw, error_ratio, level_attribute
from plugins.attention.variant import Variant
from plugins.torch_ops import install
from qdbev.ops.contract import MSDA, SCA
from qdbev.ops.msda import multi_scale_deformable_attention
from qdbev.ops.sca import spatial_cross_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: runs the kernels")]

DEVICE = "cuda"
OPERATORS = {SCA: spatial_cross_attention, MSDA: multi_scale_deformable_attention}
BOTH = [SIZES[0], SIZES[5]]
"""Sizes of spatial cross-attention and of multi-scale deformable attention."""


def problem(sizes: Variant) -> Case:
    return draw("", sizes, Generator().manual_seed(0))


def tensors(case: Case, with_gradient: bool, device: str = DEVICE) -> list[Tensor]:
    """Return the operator's inputs on a device. `with_gradient` lets all of them but `visible` require a gradient."""
    return [x.to(device).requires_grad_(with_gradient and x is not case.visible) for x in (case.value, *case.others())]


def registered(sizes: Variant):
    return getattr(torch.ops.qdbev, sizes.operator.torch_name)


def flat(sizes: Variant) -> list[int]:
    return level_attribute(sizes)["level_hw"]


@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[4]])  # one level: quick to trace
@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_operator_is_registered_as_torch_wants_it(sizes, with_gradient):
    install()
    library.opcheck(registered(sizes).default, (*tensors(problem(sizes), with_gradient), flat(sizes)))


@pytest.mark.parametrize("sizes", BOTH)
def test_the_operator_trains_with_the_gradient_that_the_cpu_gives(sizes):
    def gradients(operator, device, levels):
        learned = tensors(problem(sizes), True, device)
        out = operator(*learned, levels)
        return torch.autograd.grad(out.square().sum(), [x for x in learned if x.requires_grad])

    install()
    wanted = gradients(OPERATORS[sizes.operator], "cpu", sizes.level_hw)
    for ours, theirs in zip(gradients(registered(sizes), DEVICE, flat(sizes)), wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)  # sums by atomic additions, in any order


@pytest.mark.parametrize("sizes", BOTH)
def test_evaluation_is_the_kernel_on_the_current_stream(sizes):
    install()
    case = problem(sizes)
    truth = case.truth(case.value, 1.0)
    inputs = tensors(case, False)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = [x.clone() for x in inputs]  # a kernel on another stream would read them too early
        out = OPERATORS[sizes.operator](*late, sizes.level_hw)
    stream.synchronize()
    assert error_ratio("float32", 1.0, out.cpu(), truth) <= 1


@pytest.mark.parametrize("sizes", BOTH)
def test_the_kernel_can_be_captured_in_a_cuda_graph(sizes):
    install()
    first, second = (draw("", sizes, Generator().manual_seed(seed)) for seed in (0, 1))
    inputs = tensors(first, False)
    with torch.inference_mode():
        registered(sizes)(*inputs, flat(sizes))  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = registered(sizes)(*inputs, flat(sizes))
        for held, other in zip(inputs, (second.value, *second.others()), strict=True):
            held.copy_(other)
        graph.replay()
    torch.cuda.synchronize()
    assert error_ratio("float32", 1.0, out.cpu(), second.truth(second.value, 1.0)) <= 1
