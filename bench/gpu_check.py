"""Checks everything that needs a GPU, with one command, within ten minutes: `python -m bench.gpu_check --out results`.

The kernels, their operators in torch, and the network on the GPU compared with the CPU need only torch, cuda-python and NVRTC. With all of
requirements.txt installed, a W8A8 network is made from random weights and a small synthetic world, and its training steps are timed. With
TensorRT or TensorRT-RTX, engines of it are built, compared with onnxruntime and measured, and the models of --run are scored as engines,
beside their ONNX files and checkpoints. The result is <gpu>_<date>.json, which is written after each check.
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench import gpu_network, report
from bench.checks import Check, Figures, Result, Skipped, run_all
from qdbev import artifact
from qdbev.command import entry_point

LIMIT_S = 580.0
"""Seconds for all checks together."""
WORK = Path("runs/gpu_check")
"""Folder for the files and the output of the checks; it is emptied at the start."""
STUDENTS = ("w8a8", "w4a6")
"""Names of the models of a run that are scored as engines."""
OPERATOR_TESTS = Path("tests/test_plugins_gpu.py")
"""Tests on a GPU that need no TensorRT; the other tests marked gpu or trt need it."""
_FULL = ("cv2", "nuscenes", "pytorch_quantization", "scipy")
_EXPORT = ("onnx", "onnxruntime", "onnxscript", "pytorch_quantization")
_ITERATIONS = "500"
"""Frames for which an engine is measured."""
_QUERY_LIMIT_S = 10.0
"""Seconds that nvidia-smi may take; it can hang when the driver does."""
_log = logging.getLogger(__name__)


class GpuCheckError(ValueError):
    """There is no GPU, no check could run, or a check failed."""


def gpu() -> dict[str, Any]:
    """Facts about this machine's first GPU and its driver. Raises GpuCheckError if torch finds none."""
    if not torch.cuda.is_available():
        raise GpuCheckError(
            f"gpu-check needs an NVIDIA GPU with its driver (libcuda.so.1) and a CUDA build of torch, and torch {torch.__version__} finds "
            "none on this machine; run it on a machine with a GPU. `make test` runs all checks that need only a CPU"
        )
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--id=0", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        with suppress(subprocess.TimeoutExpired):
            output = subprocess.run(query, capture_output=True, text=True, check=False, timeout=_QUERY_LIMIT_S).stdout
            facts |= dict(zip(("driver", "max_sm_clock", "power_limit"), output.strip().split(", "), strict=False))
    return facts


def file_name(gpu_name: str, day: str) -> str:
    """Name of the result file: the GPU's name up to its memory size, and the day, such as `nvidia-h100_2026-11-21.json`."""
    words = re.sub(r"[^a-z0-9]+", " ", gpu_name.lower()).split()
    sized = (index for index, word in enumerate(words) if re.fullmatch(r"\d+gb", word))
    return f"{'-'.join(words[: next(sized, len(words))])}_{day}.json"


def plan(run: Path, work: Path) -> list[Check]:
    """All checks, the most valuable first. The models of `run` are copied into `work`."""
    return [*_kernels(work), *_network_files(work), *_engines(work), *_students(run, work)]


def check(checks: Sequence[Check], device: dict[str, Any], out: Path, work: Path, limit_s: float) -> dict[str, Result]:
    """Run the checks; after each of them, write all results so far to the file `out`."""
    started = time.monotonic()
    results: dict[str, Result] = {}
    for name, result in run_all(checks, work, limit_s):
        results[name] = result
        _log.info("%-18s %s%s", name, result.status, f": {result.reason}" if result.reason else f" in {result.seconds:.1f} s")
        content = {
            "gpu": device,
            "command": "python -m bench.gpu_check",
            "complete": len(results) == len(checks),
            "seconds": round(time.monotonic() - started, 1),
            "checks": {name: dataclasses.asdict(result) for name, result in results.items()},
        }
        report.write(out, content)
    return results


def require_passed(results: dict[str, Result], out: Path) -> None:
    """Raise GpuCheckError if a check failed, or none passed."""
    failed = [name for name, result in results.items() if result.status == "failed"]
    if failed:
        raise GpuCheckError(
            f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}; see {out} for the reasons and the end of their output"
        )
    if not any(result.status == "passed" for result in results.values()):
        raise GpuCheckError(f"no check could run; {out} says what is missing for each")


def test_counts(path: Path) -> Figures:
    """Read the tests in pytest's JUnit file; returns their names by outcome.

    Raises:
        Skipped: All tests were skipped, or there were none.
    """
    ended: dict[str, Any] = {"passed": [], "failed": [], "skipped": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        name, skip = f"{case.get('classname')}.{case.get('name')}", case.find("skipped")
        if skip is not None:
            ended["skipped"][name] = skip.get("message", "")
        else:
            ended["passed" if case.find("failure") is None and case.find("error") is None else "failed"].append(name)
    if not ended["passed"] and not ended["failed"]:
        raise Skipped("; ".join(dict.fromkeys(ended["skipped"].values())) or "no test is marked gpu")
    return ended


def _kernels(work: Path) -> Iterator[Check]:
    """Checks of the kernels: alone, as operators of torch, and in a network; a quantized network needs pytorch-quantization."""
    yield _measurement("kernels", ("bench.kernels",), work, limit_s=300, packages=("cuda.bindings",))
    yield _tests("operators", [OPERATOR_TESTS], work, limit_s=120)
    for bits, packages in ((gpu_network.FLOAT, ()), ("w8a8", ("pytorch_quantization", "scipy"))):
        yield _measurement(f"network_{bits}", ("bench.gpu_network", "--bits", bits), work, packages=("cuda.bindings", *packages))


def _network_files(work: Path) -> Iterator[Check]:
    """Checks that make a W8A8 network of random weights, calibrated on the GPU with three scenes, and time its training steps."""
    world, teacher, student = work / "world", work / "teacher.pt", work / "untrained.pt"
    generate = ("synthetic.generate", "--world", "micro", "--scenes", "2", "1", "--workers", "1", "--out", str(world))
    yield Check(name="world", command=generate, limit_s=60, packages=_FULL)
    untrained = ("bench.untrained", "--recipe", "micro", "--teacher", str(teacher), "--set", f"data.root={world}")
    yield Check(name="teacher", command=untrained, limit_s=60, packages=_FULL, after=("world",))
    quantize = ("train.qat", "--teacher", str(teacher), "--student", str(student), "--bits", "w8a8", "--device", "cuda")
    few = ("--set", "quant.stages=()", "--set", "quant.calibration_samples=8")
    yield Check(name="calibration", command=(*quantize, *few), limit_s=90, packages=_FULL, after=("teacher",))
    measure = ("bench.step_cost", "--teacher", str(teacher), "--bits", "w8a8", "--device", "cuda")
    yield _measurement("step_cost", measure, work, packages=_FULL, after=("teacher",))
    export = ("export.to_onnx", "--checkpoint", str(student), "--onnx", str(student.with_suffix(".onnx")))
    yield Check(name="onnx", command=export, limit_s=90, packages=_EXPORT, after=("calibration",))


def _engines(work: Path) -> Iterator[Check]:
    """Checks of that network's engines with both TensorRT variants. An engine of TensorRT-RTX may refuse this GPU, which is a skip."""
    onnx = str(work / "untrained.onnx")
    for package, may_be_refused in (("tensorrt", False), ("tensorrt_rtx", True)):
        engine = str(work / f"{package}.engine")
        build, bench, same = (f"{package}_{step}" for step in ("build", "bench", "same"))
        yield _build(build, onnx, engine, package, after=("onnx",))
        needs = (package, "cuda.bindings")
        measure = ("engine.bench", "--engine", engine, "--iterations", _ITERATIONS)
        yield _measurement(bench, measure, work, packages=needs, after=(build,), may_be_refused=may_be_refused)
        compare = ("bench.gpu_engine", "--engine", engine, "--onnx", onnx)
        yield _measurement(same, compare, work, packages=needs, after=(bench,))


def _students(run: Path, work: Path) -> Iterator[Check]:
    """Checks of the engines of a run's models: build, and score on the run's data; then the tests that need TensorRT."""
    package = "tensorrt" if importlib.util.find_spec("tensorrt") else "tensorrt_rtx"
    same = f"{package}_same"
    for name in STUDENTS:
        copied, files = work / "run" / name, tuple(run / f"{name}{suffix}" for suffix in (".pt", ".onnx", ".onnx.seal.json"))
        data = _copy_model(run, name, copied.parent) if all(path.is_file() for path in files) else ()
        onnx, engine = (str(copied.with_suffix(suffix)) for suffix in (".onnx", ".engine"))
        yield _build(f"{name}_build", onnx, engine, package, files=files, after=(same,))
        yield Check(
            name=f"{name}_nds",
            command=("eval.engine_eval", "--model", engine, "--device", "cuda"),
            limit_s=180,
            packages=(*_FULL, "onnxruntime", "cuda.bindings"),
            files=data,
            after=(f"{name}_build",),
            figures=copied.parent / "eval" / f"{name}_engine_compared.json",
            read=read_scores,
        )
    marked = sorted(path for path in OPERATOR_TESTS.parent.glob("test_*.py") if re.search(r"pytest\.mark\.(gpu|trt)\b", path.read_text()))
    paths = [path for path in marked if path != OPERATOR_TESTS]
    yield _tests("engines", paths, work, limit_s=180, after=(same,))


def _measurement(name: str, command: tuple[str, ...], work: Path, limit_s: float = 90, **settings: Any) -> Check:
    """A check whose command writes its figures into the file that --out names."""
    figures = work / f"{name}.json"
    return Check(name=name, command=(*command, "--out", str(figures)), limit_s=limit_s, figures=figures, **settings)


def _build(name: str, onnx: str, engine: str, package: str, **settings: Any) -> Check:
    """A check that builds an engine with the TensorRT of this package."""
    command = ("engine.build", "--onnx", onnx, "--out", engine, "--backend", package.replace("_", "-"))
    return Check(name=name, command=command, limit_s=180, packages=(package,), **settings)


def _tests(name: str, paths: Sequence[Path], work: Path, **settings: Any) -> Check:
    """A check that runs the tests in these files that need a GPU."""
    figures = work / f"{name}.xml"
    options = ("-m", "gpu or trt", "-q", "-p", "no:cacheprovider", "-o", "addopts=", f"--junitxml={figures}")
    return Check(
        name=name,
        command=("pytest", *options, *map(str, paths)),
        packages=("pytest", "cv2", "cuda.bindings"),
        files=(OPERATOR_TESTS,),  # the other test files are in the same folder
        figures=figures,
        read=test_counts,
        **settings,
    )


def _copy_model(run: Path, name: str, folder: Path) -> tuple[Path, ...]:
    """Copy a model, its ONNX and seal into `folder`, so that its engine does not replace the run's own; returns its dataset's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (run / f"{name}.pt", *run.glob(f"{name}.onnx*")):
        shutil.copy(path, folder)
    return (Path(artifact.unseal(folder / f"{name}.onnx", "onnx").config["data"]["root"]),)


def read_scores(path: Path) -> Figures:
    """Read the result of eval.engine_eval without the rows of every frame."""
    content = json.loads(path.read_text())
    return {name: value for name, value in content.items() if name not in ("rows", "made")}


def end(number: int, _: object) -> None:
    """Handle a signal by ending the process in the normal way, so that the running check is ended too."""
    sys.exit(f"ended by {signal.Signals(number).name}")


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Run all checks that need a GPU; fails if one of them fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for <gpu>_<date>.json")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run whose w8a8 and w4a6 are scored (default: %(default)s)")
    args = parser.parse_args(argv)
    device = gpu()
    signal.signal(signal.SIGTERM, end)  # so that the running check is ended as well
    shutil.rmtree(WORK, ignore_errors=True)
    out = args.out / file_name(device["name"], datetime.now(UTC).date().isoformat())
    results = check(plan(args.run, WORK), device, out, WORK, LIMIT_S)
    sys.stdout.write(f"{out}\n")
    require_passed(results, out)


if __name__ == "__main__":
    main()
