"""Test the operators in PyTorch on a real GPU: registration, gradients, streams, CUDA graphs. test_plugins_torch.py needs no GPU."""

import pytest
import torch
from attention_operators import BOTH, ONE_LEVEL, OPERATORS, flat, inputs, problem, registered
from torch import library

from plugins.attention.cases import error_ratio
from plugins.torch_ops import install

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: runs the kernels")]

DEVICE = "cuda"


@pytest.mark.parametrize("sizes", ONE_LEVEL)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_operator_is_registered_on_a_gpu_as_torch_wants_it(sizes, with_gradient):
    install()
    library.opcheck(registered(sizes).default, (*inputs(problem(sizes), with_gradient, DEVICE), flat(sizes)))


@pytest.mark.parametrize("sizes", BOTH)
def test_the_operator_trains_with_the_gradient_that_the_cpu_gives(sizes):
    def gradients(operator, device, levels):
        learned = inputs(problem(sizes), True, device)
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
    given = inputs(case, False, DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = [x.clone() for x in given]  # a kernel on another stream would read them too early
        out = OPERATORS[sizes.operator](*late, sizes.level_hw)
    stream.synchronize()
    assert error_ratio("float32", 1.0, out.cpu(), truth) <= 1


@pytest.mark.parametrize("sizes", BOTH)
def test_the_kernel_can_be_captured_in_a_cuda_graph(sizes):
    install()
    first, second = (problem(sizes, seed) for seed in (0, 1))
    given = inputs(first, False, DEVICE)
    with torch.inference_mode():
        registered(sizes)(*given, flat(sizes))  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = registered(sizes)(*given, flat(sizes))
        for held, other in zip(given, (second.value, *second.others()), strict=True):
            held.copy_(other)
        graph.replay()
    torch.cuda.synchronize()
    assert error_ratio("float32", 1.0, out.cpu(), second.truth(second.value, 1.0)) <= 1
