"""Test the CPU kernels: against PyTorch in float64 on every instruction set of this CPU, in training, and their compilation."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_operators import BOTH, OPERATORS, flat, inputs, problem, registered
from torch import Generator, Tensor, library

from plugins import torch_ops
from plugins.attention.cases import edge_cases, error_ratio, level_attribute, operator_inputs, random_cases
from plugins.cpu import build
from plugins.cpu import torch_ops as on_cpu
from plugins.cpu.build import CompilerError
from qdbev.ops import kernels
from qdbev.ops.contract import MSDA, SCA
from qdbev.ops.deform_conv import gathered_columns, modulated_deformable_im2col

TYPES = (("float32", "float32"), ("int8", "float32"))
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        build.compiled("torch")
    except CompilerError as error:
        pytest.skip(str(error))


@pytest.fixture
def installed() -> None:
    """Let the functions of qdbev/ops call the CPU kernels during one test."""
    assert torch_ops.install_on_cpu()


def worst_ratio(count: int) -> float:
    """Largest error over the permitted one, of `count` random problems and all edge cases in float32 and int8."""
    worst = 0.0
    for case in (*random_cases(count), *edge_cases()):
        for types in TYPES:
            variant, value, scale = case.in_types(types)
            given = operator_inputs(variant, value, scale, case.others())
            out = on_cpu.attend(variant.form, given, level_attribute(variant)["level_hw"])
            worst = max(worst, error_ratio(types[0], scale, out, case.truth(value, scale)))
    return worst


def test_the_kernels_compute_what_pytorch_computes_in_float64() -> None:
    assert worst_ratio(300) <= 1


def test_so_do_those_for_cpus_without_vector_instructions() -> None:
    code = "import test_plugins_cpu as t; from plugins.cpu import torch_ops as o; print(o.instruction_set(), t.worst_ratio(40) <= 1)"
    environment = {**os.environ, "QDBEV_CPU_KERNELS": "plain", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=240)
    assert done.stdout.split() == ["plain", "True"]


@pytest.mark.parametrize("channels", [1, 3, 12, 48, 96, 160])
def test_any_number_of_channels_per_head_is_computed(channels: int) -> None:
    case = problem(BOTH[0])
    value = torch.randn(*case.value.shape[:-1], channels, generator=Generator().manual_seed(0))
    out = on_cpu.attend(SCA, [value, *case.others()], flat(BOTH[0]))
    assert error_ratio("float32", 1.0, out, dataclasses.replace(case, value=value).truth(value, 1.0)) <= 1


@pytest.mark.parametrize("sizes", BOTH)
def test_the_operator_is_registered_as_torch_wants_it(sizes, installed) -> None:
    library.opcheck(registered(sizes).default, (*inputs(problem(sizes), True), flat(sizes)))


@pytest.mark.parametrize("sizes", BOTH)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_are_those_of_pytorch_in_float64(sizes, seed: int, installed) -> None:
    case = problem(sizes, seed, num_query=20)
    ours, truth = inputs(case, True), [x.detach().double().requires_grad_(x.requires_grad) for x in inputs(case, True)]
    out, wanted = (OPERATORS[sizes.operator](*tensors, sizes.level_hw) for tensors in (ours, truth))
    slope = torch.randn(out.shape, generator=Generator().manual_seed(seed))
    found = torch.autograd.grad(out, [x for x in ours if x.requires_grad], slope)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, [x for x in truth if x.requires_grad], slope.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone_is_the_same(wanted: int, installed) -> None:
    sizes = BOTH[1]
    tensors = inputs(problem(sizes), True)
    together = torch.autograd.grad(OPERATORS[MSDA](*tensors, sizes.level_hw).sum(), tensors)
    alone = [x.detach().requires_grad_(index == wanted) for index, x in enumerate(tensors)]
    (found,) = torch.autograd.grad(OPERATORS[MSDA](*alone, sizes.level_hw).sum(), alone[wanted])
    assert torch.equal(found, together[wanted])


def test_numbers_other_than_float32_and_a_process_without_the_kernels_use_pytorch(installed, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(problem(BOTH[0]), False)
    assert kernels.run_operator(*tensors)
    assert not kernels.run_operator(*(tensor.double() for tensor in tensors))
    monkeypatch.setattr(kernels, "_TRAINED_ON", set())
    assert not kernels.run_operator(*tensors)


@pytest.mark.parametrize(("stride", "out_hw"), [(1, (7, 9)), (2, (4, 5))])
def test_the_gather_of_deformable_convolutions_equals_pytorch_and_has_its_gradient(stride: int, out_hw, installed) -> None:
    generator = Generator().manual_seed(0)
    shapes = ((2, 3, 7, 9), (2, 18, *out_hw), (2, 9, *out_hw))
    given: list[Tensor] = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in given]
    out, wanted = modulated_deformable_im2col(*given, stride), gathered_columns(*exact, stride)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=0)
    ours, theirs = torch.autograd.grad(out.square().sum(), given), torch.autograd.grad(wanted.square().sum(), exact)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=1e-4, rtol=1e-4)


def test_the_memory_that_the_kernels_touch_is_their_own(tmp_path: Path) -> None:
    """A program with all cases of one small size runs under the address and undefined-behaviour sanitizers."""
    program = tmp_path / "check"
    folder = ROOT / "plugins" / "cpu"
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-Wno-psabi",
        "-DINSTRUCTION_SET=plain",
    ]
    sources = ["-DINSTRUCTION_SET=plain", str(Path(__file__).with_name("cpu_kernels_check.cpp")), str(folder / "kernels.cpp")]
    subprocess.run(["g++", *flags, f"-I{folder}", *sources, "-o", str(program)], check=True, capture_output=True, timeout=240)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[:2000]


def test_without_a_compiler_there_is_one_warning_and_pytorch_computes(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(build, "_FOLDER", Path("absent"))
    monkeypatch.setenv("PATH", "/nowhere")
    build._compiler.cache_clear()
    build.compiled_if_possible.cache_clear()
    try:
        assert build.compiled_if_possible("torch") is None and build.compiled_if_possible("torch") is None
    finally:
        build._compiler.cache_clear()
        build.compiled_if_possible.cache_clear()
    assert caplog.text.count("g++ was not found; install it") == 1


def test_sources_that_do_not_compile_are_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "_FOLDER", tmp_path)
    monkeypatch.setattr(build, "_FLAGS", ("-std=c++20", "-DINT64_MAX=", "-fno-such-flag"))
    with pytest.raises(CompilerError, match=r"cannot compile the CPU kernels: .*no-such-flag"):
        build.compiled("torch")
    assert not list(tmp_path.iterdir())
