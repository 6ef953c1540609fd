"""Test the kernels as PyTorch operators without a GPU: registration, gradients, the arguments of a launch, and its errors.

Launches run the kernels compiled for the host. tests/test_bench_kernels.py tests the benchmark.
"""

import ctypes
from itertools import product

import pytest
import torch
from attention_operators import BOTH, ONE_LEVEL, OPERATORS, flat, inputs, problem, registered
from kernel_on_host import HostKernels
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from plugins import launch
from plugins.attention.cases import SIZES, error_ratio, level_attribute, operator_inputs
from plugins.attention.variant import TYPES
from plugins.kernel import KernelError
from plugins.launch import LaunchError, compute
from plugins.torch_ops import install
from qdbev.ops.contract import SCA, SCA_INT8
from qdbev.ops.kernels import run_operator


@pytest.mark.parametrize("sizes", ONE_LEVEL)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_operator_is_registered_as_torch_wants_it(sizes, with_gradient):
    install()
    library.opcheck(registered(sizes).default, (*inputs(problem(sizes, num_cameras=1), with_gradient), flat(sizes)))


@pytest.mark.parametrize("sizes", BOTH)
def test_the_operator_trains_with_the_gradient_of_the_pytorch_function(sizes):
    def gradients(operator, levels):
        tensors = inputs(problem(sizes), True)
        return torch.autograd.grad(operator(*tensors, levels).square().sum(), [x for x in tensors if x.requires_grad])

    install()
    ours = gradients(registered(sizes), flat(sizes))
    for mine, theirs in zip(ours, gradients(OPERATORS[sizes.operator], sizes.level_hw), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", BOTH)
def test_a_kernel_is_registered_for_cuda_and_installing_twice_does_nothing(sizes):
    install()
    install()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qdbev::{sizes.operator.torch_name}", "CUDA")


class Calls(TorchDispatchMode):
    """Records the names of the PyTorch operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sizes", BOTH)
def test_evaluation_on_a_gpu_calls_the_operator(sizes):
    case = problem(sizes)
    with FakeTensorMode(), torch.no_grad(), Calls() as calls:
        tensors = [torch.empty(x.shape, device="cuda") for x in (case.value, *case.others())]
        out = OPERATORS[sizes.operator](*tensors, sizes.level_hw)
    assert out.is_cuda and calls.names.count(f"qdbev.{sizes.operator.torch_name}.default") == 1


def test_the_operator_is_called_on_a_gpu_unless_a_gradient_is_asked_for():
    plain, learned_one = torch.ones(1), torch.ones(1, requires_grad=True)
    assert not run_operator(plain, plain)
    with FakeTensorMode():
        plain, learned_one = torch.ones(1, device="cuda"), torch.ones(1, device="cuda", requires_grad=True)
        assert run_operator(plain, plain)
        assert not run_operator(plain, learned_one)
        with torch.no_grad():
            assert run_operator(plain, learned_one)


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels([problem(sizes).in_types(types)[0] for sizes in BOTH for types in TYPES], tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def on_host(host_kernels, monkeypatch) -> None:
    """Let launches run on the host."""
    monkeypatch.setattr(launch, "run", host_kernels.run)
    monkeypatch.setattr(launch, "require_one_gpu", lambda tensors: None)


@pytest.mark.parametrize(("sizes", "types"), product(BOTH, TYPES))
def test_a_launch_passes_what_the_kernel_expects(on_host, sizes, types):
    for case in (problem(sizes), problem(sizes, batch=1, num_query=25)):  # 25 queries are treated as a square grid
        variant, value, scale = case.in_types(types)
        out = compute(variant.form, operator_inputs(variant, value, scale, case.others()), level_attribute(variant))
        assert out.dtype == getattr(torch, types[1])
        assert error_ratio(types[0], scale, out, case.truth(value, scale)) <= 1


def test_inputs_of_other_layouts_and_types_are_brought_in_order(on_host):
    case = problem(SIZES[0])
    value = case.value.transpose(2, 3).contiguous().transpose(2, 3)
    points, visible, offsets, logits = case.others()
    crooked = torch.empty(logits.numel() + 1)[1:].view_as(logits).copy_(logits)  # starts at 4 bytes
    out = compute(SCA, [value, points.double(), visible.double(), offsets, crooked], level_attribute(SIZES[0]))
    assert error_ratio("float32", 1.0, out, case.truth(case.value, 1.0)) <= 1


def test_no_queries_are_no_launch(monkeypatch):
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(launch, "require_one_gpu", lambda tensors: None)
    case = problem(SIZES[0])
    points, visible, offsets, logits = case.others()
    given = [case.value, points[:, :, :0], visible[:, :, :0], offsets[:, :0], logits[:, :0]]
    out = compute(SCA, given, level_attribute(SIZES[0]))
    assert out.shape == (2, 0, 64)


def test_pointers_are_passed_as_addresses_and_sizes_as_int32(monkeypatch):
    passed = []
    monkeypatch.setattr(launch, "run", lambda *arguments: passed.append(arguments))
    monkeypatch.setattr(launch, "require_one_gpu", lambda tensors: None)
    case = problem(SIZES[0], num_query=49)
    variant, value, scale = case.in_types(("int8", "float16"))
    given = operator_inputs(variant, value, scale, case.others())
    out = compute(SCA_INT8, given, level_attribute(variant))
    ((kernel, launched, tensors, result),) = passed
    assert (kernel, launched.grid) == (variant, (1, 2, 2)) and result is out
    values, types = launch.arguments(launched, tensors, result)
    assert values == (*(x.data_ptr() for x in given), 49, 3, 7, out.data_ptr())
    assert types == (*[ctypes.c_void_p] * 6, *[ctypes.c_int] * 3, ctypes.c_void_p)


def test_tensors_that_are_not_on_a_gpu_are_refused():
    case = problem(SIZES[0])
    with pytest.raises(LaunchError, match="value is on cpu and value on cpu; .* one GPU"):
        compute(SCA, [case.value, *case.others()], level_attribute(SIZES[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, o: [v[:, :2], *o], r"reference_points is \(2, 3, 6, 4, 2\), must be \(2, 2, 6, 4, 2\)"),
        (lambda v, o: [v, o[0], o[1][:, :, :5], *o[2:]], r"visible is \(2, 3, 5\), must be \(2, 3, 6\)"),
        (lambda v, o: [v, *o[:2], o[2][:, :, :1], o[3]], r"sampling_offsets is \(2, 6, 1, 2, 8, 2\)"),
        (lambda v, o: [v[:, :, 1:], *o], r"value is \(2, 3, 46, 2, 32\), must be \(2, 3, 47, 2, 32\)"),
        (lambda v, o: [v, *o[:3], o[3][..., 0]], r"attention_logits \(2, 6, 2, 2\); SpatialCrossAttention needs the shapes"),
        (
            lambda v, o: [v.to(torch.int8), *o],
            "value is torch.int8; the kernels of SpatialCrossAttention compute float32 to float32, float16",
        ),
        (lambda v, o: [v.bfloat16(), *o], "value is torch.bfloat16; the kernels of SpatialCrossAttention compute"),
        (lambda v, o: [v, *o[:2]], "inputs value, reference_points, visible, .*, but 3 tensors were passed"),
        (lambda v, o: [x.repeat(1, 11, *[1] * (x.ndim - 2)) for x in (v, *o[:2])] + o[2:], "33 cameras; .* up to 32"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change, words):
    case = problem(SIZES[0])
    with pytest.raises((LaunchError, KernelError), match=words):
        compute(SCA, change(case.value, case.others()), level_attribute(SIZES[0]))


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.tensor(1), "value is torch.int8 and value_scale is torch.int64; the kernels of SpatialCrossAttentionInt8 compute int8 to"),
        (torch.ones(2), r"value_scale is \(2,\), must be one number"),
    ],
)
def test_a_scale_that_is_not_one_float_is_refused(scale, words):
    case = problem(SIZES[0])
    with pytest.raises((LaunchError, KernelError), match=words):
        compute(SCA_INT8, [case.value.to(torch.int8), scale, *case.others()], level_attribute(SIZES[0]))


def test_sizes_without_a_kernel_are_refused():
    case = problem(SIZES[0])
    with pytest.raises(KernelError, match="31 channels"):
        compute(SCA, [case.value[..., :31], *case.others()], level_attribute(SIZES[0]))
