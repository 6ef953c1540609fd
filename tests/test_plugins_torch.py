"""The kernels as torch operators: registration, gradients, what a launch passes and what it refuses, and what the benchmark counts.

No GPU is needed: launches go to the kernels compiled for the host.
"""

import ctypes
import json
from itertools import product

import pytest
import torch
from kernel_on_host import HostKernels
from torch import Generator, Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench import kernels
from bench.memory_traffic import corners_inside, cost
from plugins import launch
from plugins.cases import SIZES, Case, draw, excess
from plugins.launch import LaunchError, attention
from plugins.torch_ops import install
from plugins.variant import TYPES, Variant, VariantError, of_recipe
from qdbev.geometry import pillar_points, project
from qdbev.ops.msda import evaluated_on_gpu, multi_scale_deformable_attention
from qdbev.ops.sca import spatial_cross_attention
from qdbev.recipes import base

OPERATORS = {"spatial_cross_attention": spatial_cross_attention, "multi_scale_deformable_attention": multi_scale_deformable_attention}
BOTH = [SIZES[0], SIZES[5]]
"""Sizes of each operator."""


def problem(sizes: Variant, **settings: int) -> Case:
    return draw("", sizes, Generator().manual_seed(0), **settings)


def learned(case: Case) -> list[Tensor]:
    """The operator's inputs, all but `visible` with a gradient."""
    return [x.clone().requires_grad_(x is not case.visible) for x in (case.value, *case.others())]


def flat(sizes: Variant) -> list[int]:
    return [size for hw in sizes.level_hw for size in hw]


@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[4]])  # one level: quick to trace
@pytest.mark.parametrize("with_gradient", [False, True])
def test_the_operator_is_registered_as_torch_wants_it(sizes, with_gradient):
    install()
    tensors = [x if with_gradient else x.detach() for x in learned(problem(sizes, num_cameras=1))]
    library.opcheck(getattr(torch.ops.qdbev, sizes.op).default, (*tensors, flat(sizes)))


@pytest.mark.parametrize("sizes", BOTH)
def test_the_operator_trains_with_the_gradient_of_the_pytorch_function(sizes):
    def gradients(operator, levels):
        tensors = learned(problem(sizes))
        return torch.autograd.grad(operator(*tensors, levels).square().sum(), [x for x in tensors if x.requires_grad])

    install()
    ours = gradients(getattr(torch.ops.qdbev, sizes.op), flat(sizes))
    for mine, theirs in zip(ours, gradients(OPERATORS[sizes.op], sizes.level_hw), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", BOTH)
def test_a_kernel_is_registered_for_cuda_and_installing_twice_does_nothing(sizes):
    install()
    install()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qdbev::{sizes.op}", "CUDA")


class Calls(TorchDispatchMode):
    """Names of the operators that are called."""

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
        out = OPERATORS[sizes.op](*tensors, sizes.level_hw)
    assert out.is_cuda and calls.names.count(f"qdbev.{sizes.op}.default") == 1


def test_the_operator_is_called_on_a_gpu_unless_a_gradient_is_asked_for():
    plain, learned_one = torch.ones(1), torch.ones(1, requires_grad=True)
    assert not evaluated_on_gpu(plain, plain)
    with FakeTensorMode():
        plain, learned_one = torch.ones(1, device="cuda"), torch.ones(1, device="cuda", requires_grad=True)
        assert evaluated_on_gpu(plain, plain)
        assert not evaluated_on_gpu(plain, learned_one)
        with torch.no_grad():
            assert evaluated_on_gpu(plain, learned_one)


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels([problem(sizes).inputs(*types)[0] for sizes in BOTH for types in TYPES], tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def on_host(host_kernels, monkeypatch) -> None:
    """Launches run on the host."""
    monkeypatch.setattr(launch, "run", host_kernels.run)
    monkeypatch.setattr(launch, "require_one_gpu", lambda tensors: None)


@pytest.mark.parametrize(("sizes", "types"), product(BOTH, TYPES))
def test_a_launch_passes_what_the_kernel_expects(on_host, sizes, types):
    number, dtype = types[0], getattr(torch, types[1])
    for case in (problem(sizes), problem(sizes, batch=1, num_query=25)):  # 25 are taken for a grid
        _, value, scale = case.inputs(*types)
        value_scale = torch.tensor(scale, dtype=dtype) if number == "int8" else None
        out = attention(value, case.others(), sizes.level_hw, value_scale)
        assert out.dtype == dtype
        assert excess(number, scale, out, case.truth(value, scale)) <= 1


def test_inputs_of_other_layouts_and_types_are_brought_in_order(on_host):
    case = problem(SIZES[0])
    value = case.value.transpose(2, 3).contiguous().transpose(2, 3)
    points, visible, offsets, logits = case.others()
    crooked = torch.empty(logits.numel() + 1)[1:].view_as(logits).copy_(logits)  # begins at 4 bytes
    out = attention(value, [points.double(), visible.double(), offsets, crooked], SIZES[0].level_hw)
    assert excess("float32", 1.0, out, case.truth(case.value, 1.0)) <= 1


def test_no_queries_are_no_launch(monkeypatch):
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(launch, "require_one_gpu", lambda tensors: None)
    case = problem(SIZES[0])
    points, visible, offsets, logits = case.others()
    out = attention(case.value, [points[:, :, :0], visible[:, :, :0], offsets[:, :0], logits[:, :0]], SIZES[0].level_hw)
    assert out.shape == (2, 0, 64)


def test_pointers_are_passed_as_addresses_and_sizes_as_int32(monkeypatch):
    passed = []
    monkeypatch.setattr(launch, "run", lambda *arguments: passed.append(arguments))
    monkeypatch.setattr(launch, "require_one_gpu", lambda tensors: None)
    case = problem(SIZES[0], num_query=49)
    _, value, scale = case.inputs("int8", "float16")
    value_scale = torch.tensor([scale], dtype=torch.float16)
    out = attention(value, case.others(), SIZES[0].level_hw, value_scale)
    ((device, _, kernel, grid, threads, values, types),) = passed
    assert (device, kernel, grid, threads) == (value.device, "spatial_cross_attention", (1, 2, 2), 256)
    assert values == (*(x.data_ptr() for x in (value, value_scale, *case.others())), 49, 3, 7, out.data_ptr())
    assert types == (*[ctypes.c_void_p] * 6, *[ctypes.c_int] * 3, ctypes.c_void_p)


def test_a_machine_without_a_gpu_is_told_so():
    case = problem(SIZES[0])
    with pytest.raises(LaunchError, match="value is on cpu, value on cpu; kernels read one GPU"):
        attention(case.value, case.others(), SIZES[0].level_hw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, o: (v[:, :2], o), r"reference_points is \(2, 3, 6, 4, 2\), must be \(2, 2, 6, 4, 2\)"),
        (lambda v, o: (v, [o[0], o[1][:, :, :5], *o[2:]]), r"visible is \(2, 3, 5\), must be \(2, 3, 6\)"),
        (lambda v, o: (v, [*o[:2], o[2][:, :, :1], o[3]]), r"sampling_offsets is \(2, 6, 1, 2, 8, 2\)"),
        (lambda v, o: (v[:, :, 1:], o), r"value is \(2, 3, 46, 2, 32\), must be \(2, 3, 47, 2, 32\)"),
        (lambda v, o: (v.to(torch.int8), o), "value_scale is missing"),
        (lambda v, o: (v.to(torch.int8), o, torch.tensor(1)), "value_scale is torch.int64, must be float32 or float16"),
        (lambda v, o: (v.to(torch.int8), o, torch.ones(2)), r"value_scale is \(2,\), must be one number"),
        (lambda v, o: (v.bfloat16(), o), "value is torch.bfloat16; kernels exist for float32, float16 and int8"),
        (lambda v, o: (v, o[:2]), "2 inputs behind value"),
        (lambda v, o: (v.repeat(1, 11, 1, 1, 1), [o[0].repeat(1, 11, 1, 1, 1), o[1].repeat(1, 11, 1), *o[2:]]), "33 cameras; .* and 32"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(change, words):
    case = problem(SIZES[0])
    value, others, *scale = change(case.value, case.others())
    with pytest.raises((LaunchError, VariantError), match=words):
        attention(value, others, SIZES[0].level_hw, *scale)


def test_sizes_without_a_kernel_are_refused():
    case = problem(SIZES[0])
    with pytest.raises(VariantError, match="31 channels"):
        attention(case.value[..., :31], case.others(), SIZES[0].level_hw)


def test_the_benchmark_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(tmp_path / "kernels.json")])
    with pytest.raises(SystemExit, match="error: measuring the kernels needs an NVIDIA GPU"):
        kernels.main()
    assert not list(tmp_path.iterdir())


def test_wrong_kernels_fail_the_benchmark_after_all_is_written(monkeypatch, tmp_path):
    found = {"float32 to float32": {"passed": True}, "int8 to float16": {"passed": False}}
    monkeypatch.setattr(kernels, "check", lambda: {"correctness": found})
    monkeypatch.setattr(kernels, "base_case", lambda config: None)
    monkeypatch.setattr(kernels, "measure", lambda case: {"times_ms": {}})
    monkeypatch.setattr(kernels, "goals", lambda figures: {})
    out = tmp_path / "kernels.json"
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(out)])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(kernels, "measure", lambda case: 1 / 0)
        kernels.main()
    assert json.loads(out.read_text()) == {"correctness": found}, "what was found before is kept"
    with pytest.raises(SystemExit, match="the kernels are wrong in int8 to float16; .*kernels.json"):
        kernels.main()
    assert json.loads(out.read_text()) == {"correctness": found, "times_ms": {}, "goals": {}}


def test_the_rig_of_the_benchmark_sees_most_cells_once():
    model = base().model
    points, hit = project(pillar_points(model.bev_hw, model.num_pillar_points, model.pc_range), *kernels.rig(base()))
    assert points.shape == (1, 6, 40000, 4, 2)
    assert 1.0 < float(hit.any(-1).float().sum(1).mean()) < 1.3


def test_corners_are_counted_as_they_are_read():
    case = problem(SIZES[2], num_query=9)
    count = 0
    for b, n, q in (case.visible > 0).nonzero().tolist():
        for m, level, p in product(range(2), range(4), range(8)):
            height, width = SIZES[2].level_hw[level]
            at = case.reference_points[b, n, q, p % 4] * torch.tensor([width, height]) + case.sampling_offsets[b, q, m, level, p] - 0.5
            column, row = at.floor().int().tolist()
            count += sum(0 <= c < width and 0 <= r < height for c, r in product((column, column + 1), (row, row + 1)))
    assert corners_inside(case.reference_points, case.visible, case.sampling_offsets, SIZES[2].level_hw) == count > 0


def test_base_moves_what_the_readme_says():
    corners = 40000 * 8 * 4 * 8 * 4 * 5 // 4  # at 1.25 cameras a query, all inside
    figures = {}
    for variant in of_recipe(base()):
        if variant.op == "spatial_cross_attention" and kernels.MEASURED[variant.value] == variant.out:
            counted = cost(variant, 1, 6, 40000, corners)
            megabytes = (round(counted.bytes_once / 1e6), round(counted.gathered_bytes / 1e6))
            figures[variant.value] = (*megabytes, round(counted.operations / 1e9, 1))
    assert figures == {"float32": (362, 6554, 3.3), "float16": (247, 3277, 3.3), "int8": (199, 1638, 3.3)}


def test_goals_say_what_was_reached_and_what_was_not_measured():
    times = {f"kernel_{number}": ms for number, ms in zip(kernels.MEASURED, (2.0, 1.0, 0.5), strict=True)}
    times |= {"pytorch_per_camera_float32": 20.0, "pytorch_per_camera_float16": 2.5, "mmcv_per_camera": "not measured: no mmcv"}
    found = kernels.goals({"times_ms": times, "floors_ms": {"float32": 1.2, "float16": 0.6, "int8": 0.2}})
    assert found["pytorch_over_kernel"] == {"goal": 3.0, "reached": 2.5, "met": False}
    assert found["mmcv_over_kernel"]["reached"] is None and found["mmcv_over_kernel"]["met"] is None
    assert found["floor_over_kernel"] == {"goal": 0.5, "reached": 0.4, "met": False}
    assert found["float16_over_int8"] == {"goal": 1.5, "reached": 2.0, "met": True}
    json.dumps(found)
