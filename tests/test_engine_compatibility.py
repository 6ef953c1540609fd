"""The checks of an engine's GPU and version, the command that builds it again; none needs a GPU."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from sealed_facts import engine_facts

from engine import backend, build, build_tensorrt, compatibility
from engine.backend import Backend, EngineError, Gpu
from qdbev.artifact import Seal
from qdbev.facts import BuildOptions, Target

H100 = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", bus_id="0000:00:1E.0")
H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", bus_id="0000:00:1E.0")
ADA = Gpu(name="NVIDIA RTX 4090", compute_capability="8.9", bus_id="0000:00:1E.0")


def seal(name: str, version: str, target: dict[str, Any], build: BuildOptions | None = None) -> Seal:
    capabilities = target["compute_capabilities"]
    facts = engine_facts(
        backend=(name, version),
        capabilities=None if capabilities is None else tuple(capabilities),
        gpu=target.get("gpu"),
        build=build,
    )
    return Seal(kind="engine", config={}, parent=None, facts=facts, provenance={})


def installed(name: backend.BackendName, version: str) -> Backend:
    return Backend(name=name, module=backend, version=version)  # which nobody asks for anything


def test_an_engine_runs_on_the_gpus_it_was_built_for_only() -> None:
    path = Path("run/w8a8.engine")
    for_h100 = seal("tensorrt", "11.4.0.106", {"gpu": H100.name, "compute_capabilities": ["9.0"]})
    compatibility.require_gpu(path, for_h100, H100)
    message = (
        r"w8a8\.engine was built for the NVIDIA H100 80GB HBM3 \(9\.0\); this is a NVIDIA H200 \(9\.0\)\. Build it again here:\n  python"
    )
    with pytest.raises(EngineError, match=message):
        compatibility.require_gpu(path, for_h100, H200)  # of the same compute capability
    several = seal("tensorrt-rtx", "1.7.1", {"compute_capabilities": ["8.6", "8.9"]})
    compatibility.require_gpu(path, several, ADA)
    with pytest.raises(EngineError, match=r"GPUs of compute capability 8\.6, 8\.9; this is a NVIDIA H100"):
        compatibility.require_gpu(path, several, H100)
    compatibility.require_gpu(path, seal("tensorrt-rtx", "1.7.1", {"compute_capabilities": None}), ADA)


def test_an_engine_runs_under_the_version_that_built_it_only() -> None:
    path = Path("run/w8a8.engine")
    built = seal("tensorrt", "10.13.3.9", {"gpu": H100.name, "compute_capabilities": ["9.0"]})
    compatibility.require_version(path, built, installed("tensorrt", "10.13.3.9"), H100)
    message = r"built with tensorrt 10\.13\.3\.9, installed is 11\.4\.0\.106, .*\n  python .*\n.*pip install tensorrt==10\.13\.3\.9"
    with pytest.raises(EngineError, match=message):
        compatibility.require_version(path, built, installed("tensorrt", "11.4.0.106"), H100)


@pytest.mark.parametrize(
    ("made", "device", "wanted"),
    [
        (seal("tensorrt", "10.13", {"gpu": H200.name, "compute_capabilities": ["9.0"]}), H100, "--backend tensorrt"),
        (
            seal("tensorrt-rtx", "1.7", {"compute_capabilities": ["12.0", "8.6"]}),
            ADA,
            "--backend tensorrt-rtx --compute-capability 8.6 8.9 12.0",
        ),
        (seal("tensorrt-rtx", "1.7", {"compute_capabilities": ["8.6"]}), H100, "--backend tensorrt"),  # which RTX does not build for
        (seal("tensorrt-rtx", "1.4", {"compute_capabilities": None}), ADA, "--backend tensorrt-rtx"),
        (
            seal(
                "tensorrt",
                "10.13",
                {"gpu": H200.name, "compute_capabilities": ["9.0"]},
                build=BuildOptions(onnx="../onnx/my net.onnx", memory_limit_mb=512, allow_float=True),
            ),
            H100,
            "--backend tensorrt --memory-limit 512 --allow-float",
        ),
    ],
)
def test_the_rebuild_command_is_whole_and_the_builder_understands_it(made: Seal, device: Gpu, wanted: str) -> None:
    words = shlex.split(compatibility.rebuild_command(Path("runs/demo/w8a8.engine"), made, device))
    assert words[:3] == ["python", "-m", "engine.build"]
    args = build.parse_args(words[3:])
    assert args.onnx == Path("runs/onnx/my net.onnx" if made.facts.build else "runs/demo/w8a8.onnx")
    assert args.out == Path("runs/demo/w8a8.engine")
    assert " ".join(words[7:]) == wanted


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0", "10.0.1", "7.2"])
def test_an_older_tensorrt_is_refused(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text(f"__version__ = {version!r}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # put back as it was in the end
    del sys.modules["tensorrt"]
    with pytest.raises(EngineError, match=rf"TensorRT {version} is not supported; 10\.1 or newer is: pip install"):
        backend.load("tensorrt")


def test_kernel_timings_are_kept_apart_for_each_version_and_gpu(tmp_path: Path) -> None:
    chosen, target = installed("tensorrt", "11.4.0.106"), Target(compute_capabilities=("9.0",), gpu=H100.name)
    found = build_tensorrt.timing_cache_file(chosen, target, tmp_path)
    assert found == tmp_path / "tensorrt-11.4.0.106-nvidia-h100-80gb-hbm3.timing"
    assert found != build_tensorrt.timing_cache_file(chosen, dataclasses.replace(target, gpu=H200.name), tmp_path)
    assert found != build_tensorrt.timing_cache_file(installed("tensorrt", "10.13.3.9"), target, tmp_path)
    assert build_tensorrt.timing_cache_file(chosen, target, tmp_path / "mine.timing") == tmp_path / "mine.timing"
    assert build_tensorrt.timing_cache_file(chosen, target, None) is None
    assert build_tensorrt.timing_cache_file(installed("tensorrt-rtx", "1.7.1"), target, tmp_path) is None
