"""Measures the time an engine takes for a frame.

    python -m engine.bench --engine runs/demo/w8a8.engine

Runs trtexec (tensorrt_rtx for TensorRT-RTX) if it is on PATH, else a session, as always on a CPU; the report has the same form. Frames run
one after the other without overlap. `compute` is the GPU time of the engine, `with_transfers` adds the copies of all inputs and outputs,
`with_host` adds the work from camera images to inputs and from outputs to boxes. A stream that leaves the recurrent tensors on the GPU
copies less. The report is written beside the engine, with the command line, the GPU, its clocks and memory, and all versions; for a CPU,
with its name, threads and the peak memory of the process.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine import backend, clocks, compatibility
from engine.backend import EngineError
from engine.open_session import open_session
from engine.preprocess import Preprocessor
from engine.typical_frame import typical_inputs
from qdbev import artifact, detectors
from qdbev.artifact import Seal
from qdbev.command import entry_point
from qdbev.config import Config, from_dict
from qdbev.schema import Interface

_log = logging.getLogger(__name__)
_TOOLS: dict[str, str] = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
"""Name of the measuring program of each TensorRT."""
_TRANSFERS_OPTIONAL_FROM = (11, 0)
"""First version whose trtexec copies inputs and outputs only with --includeDataTransfers."""
_WARM_UP_MS = 1000
"""Milliseconds for which frames run before the first one is measured."""
_HOST_RUNS, _HOST_WARM_UP = 100, 5
"""Measured runs of the work on the host, and runs before these."""
_TOOL_LIMIT_S = 1800.0
"""Seconds that trtexec may take; 2000 frames of the largest recipe take minutes."""


class Times(NamedTuple):
    """Milliseconds of each frame, the program that measured them, and its command line."""

    compute: list[float]
    with_transfers: list[float]
    tool: str
    command: str


def bench(engine: Path, iterations: int, threads: int | None = None) -> dict[str, Any]:
    """Measure an engine over `iterations` frames and return the report. `threads` is for engines of a CPU, all its cores if None.

    Raises:
        ArtifactError: The engine is missing, damaged or not sealed.
        EngineError: There is no GPU, the engine cannot run here, or trtexec fails.
    """
    seal = artifact.unseal(engine, "engine")
    if seal.facts.backend.name != "cpu":
        device = backend.require_gpu(f"measuring {engine}")
        compatibility.require_gpu(engine, seal, device)
    config, interface = from_dict(seal.config), seal.facts.interface
    frame = typical_inputs(config, interface)
    if seal.facts.backend.name == "cpu":
        times = _with_session(engine, frame, iterations, threads)
        return report(engine, seal, {"cpu": _cpu_facts(seal, threads)}, times, host_times(config, interface))
    tool = shutil.which(_TOOLS[seal.facts.backend.name])
    with clocks.watch(device.bus_id) as seen:
        times = _with_tool(tool, engine, seal, frame, iterations) if tool else _with_session(engine, frame, iterations, threads)
    gpu = {"name": device.name, "compute_capability": device.compute_capability, **seen}
    return report(engine, seal, {"gpu": gpu}, times, host_times(config, interface))


def _cpu_facts(seal: Seal, threads: int | None) -> dict[str, Any]:
    target = seal.facts.target
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"name": target.cpu, "instruction_set": target.instruction_set, "threads": threads or os.cpu_count(), "peak_memory_mb": peak}


def report(engine: Path, seal: Seal, device: dict[str, Any], times: Times, host: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON values; `device` has one entry with the facts of the GPU or CPU, `host` is from `host_times`."""
    runs = len(times.with_transfers)
    before, after = (np.resize(host[name], runs) for name in ("before", "after"))
    return {
        "compute": statistics(times.compute),
        "with_transfers": statistics(times.with_transfers),
        "with_host": statistics(list(before + np.array(times.with_transfers) + after)),
        "host": {"before": statistics(host["before"]), "after": statistics(host["after"]), "camera_hw": host["camera_hw"]},
        "tool": times.tool,
        "command": times.command,
        **device,
        "engine": {"name": engine.name, "sha256": seal.sha256, "bytes": seal.facts.plan_bytes, **asdict(seal.facts.backend)},
        "made": artifact.provenance(),
    }


def host_times(config: Config, interface: Interface) -> dict[str, Any]:
    """Measure the work on the host for frames of noise; the camera images are the largest that fit the network.

    Returns milliseconds of each run "before" and "after" the engine, and "camera_hw", height and width of the camera images in pixels.
    """
    rng, stream = np.random.default_rng(0), detectors.stream(config.model)
    num_cameras = interface.inputs["images"][1]
    preprocessor = Preprocessor(config.data, interface.inputs["images"][1:])
    height, width = preprocessor.largest_hw
    images = rng.integers(0, 256, (num_cameras, height, width, 3), dtype=np.uint8)
    lidar2img, can_bus = np.tile(np.eye(4), (num_cameras, 1, 1)), np.zeros(18)
    outputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in interface.outputs.items()}
    return {
        "before": _times(lambda: preprocessor.frame(images, lidar2img, can_bus, 0)),
        "after": _times(lambda: stream.decode(outputs)),
        "camera_hw": [height, width],
    }


def statistics(times_ms: list[float]) -> dict[str, float | int]:
    """Percentiles of the time per frame in milliseconds, and frames per second at the mean time."""
    if not len(times_ms):
        raise EngineError("no frame was measured; use more --iterations")
    percentiles = np.percentile(times_ms, (50, 90, 99, 99.9)).tolist()
    mean = float(np.mean(times_ms))
    return {
        **dict(zip(("p50_ms", "p90_ms", "p99_ms", "p99_9_ms"), percentiles, strict=True)),
        "mean_ms": mean,
        "frames_per_s": 1000 / mean,
        "runs": len(times_ms),
    }


def report_path(engine: Path) -> Path:
    """Path of the measurement report of `engine`."""
    return engine.with_name(engine.name + ".bench.json")


def tool_command(tool: str, engine: Path, seal: Seal, iterations: int, folder: Path) -> list[str]:
    """The command with which trtexec measures frames; `folder` contains each input as NAME.bin, and times.json is written there."""
    made_by = seal.facts.backend
    files = ",".join(f"{name}:{folder / name}.bin" for name in seal.facts.interface.inputs)
    command = [tool, f"--loadEngine={engine}", f"--loadInputs={files}", f"--iterations={iterations}", "--duration=0"]
    command += [f"--warmUp={_WARM_UP_MS}", "--exposeDMA", "--useSpinWait", "--useCudaGraph", f"--exportTimes={folder / 'times.json'}"]
    if made_by.name == "tensorrt" and backend.release(made_by.version) >= _TRANSFERS_OPTIONAL_FROM:
        command.append("--includeDataTransfers")
    return command


def read_times(text: str) -> tuple[list[float], list[float]]:
    """GPU milliseconds of each frame, without and with copies, that trtexec exported. Raises EngineError if it wrote another form."""
    try:
        rows = json.loads(text)
        return [float(row["computeMs"]) for row in rows], [float(row["latencyMs"]) for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EngineError(f"trtexec's times cannot be read ({error!r}); they begin {text[:120]!r}") from error


def _times(work: Callable[[], object]) -> list[float]:
    """Milliseconds of each run after the warm-up."""
    found = []
    for _ in range(_HOST_WARM_UP + _HOST_RUNS):
        started = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - started))
    return found[_HOST_WARM_UP:]


def _with_tool(tool: str, engine: Path, seal: Seal, frame: dict[str, np.ndarray], iterations: int) -> Times:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tensor, value in frame.items():
            value.tofile(folder / f"{tensor}.bin")
        command = tool_command(tool, engine, seal, iterations, folder)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TOOL_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"`{' '.join(command)}` took more than {_TOOL_LIMIT_S:.0f} s; use fewer --iterations") from error
        times = folder / "times.json"
        if done.returncode != 0 or not times.is_file():
            last = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise EngineError(f"`{' '.join(command)}` ended with {done.returncode}:\n  {last}")
        return Times(*read_times(times.read_text()), Path(tool).name, " ".join(command))


def _with_session(engine: Path, frame: dict[str, np.ndarray], iterations: int, threads: int | None) -> Times:
    compute, with_transfers = [], []
    with open_session(engine, threads) as session:
        begin = time.perf_counter()
        while len(compute) < iterations:
            started = time.perf_counter()
            session.infer(frame)
            ended = time.perf_counter()
            if 1e3 * (ended - begin) > _WARM_UP_MS:
                compute.append(session.compute_ms())
                with_transfers.append(1e3 * (ended - started))
    return Times(compute, with_transfers, "session", f"python -m engine.bench --engine {engine} --iterations {iterations}")


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure an engine and write the report."""
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description="Measure the time an engine takes for a frame.")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=2000, help="frames to measure (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of an engine for a CPU (default: all cores)")
    parser.add_argument("--out", type=Path, help="report as JSON (default: beside the engine)")
    args = parser.parse_args(argv)
    artifact.require_target(args.out or report_path(args.engine), args.engine)
    found = bench(args.engine, args.iterations, args.threads)
    with artifact.atomic(args.out or report_path(args.engine)) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    _log.info("%s on %s, by %s", args.engine, (found.get("gpu") or found["cpu"])["name"], found["tool"])
    for name in ("compute", "with_transfers", "with_host"):
        _log.info("%-15s p50 %8.3f ms, p90 %8.3f, p99 %8.3f, p99.9 %8.3f; %.1f frames/s over %d runs",
                  name, *(found[name][key] for key in ("p50_ms", "p90_ms", "p99_ms", "p99_9_ms", "frames_per_s", "runs")))  # fmt: skip


if __name__ == "__main__":
    main()
