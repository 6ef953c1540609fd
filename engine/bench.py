"""Measures the time an engine takes for a frame.

    python -m engine.bench --engine runs/demo/w8a8.engine

Runs trtexec (tensorrt_rtx for TensorRT-RTX) if it is on PATH, else `engine.session`; the report has the same form either way. Frames run
one after the other without overlap. `compute` is the GPU time of the engine, `with_transfers` adds the copies of all inputs and outputs,
`with_host` adds the work on the host before and after the engine (host_cost.py). A stream that leaves the recurrent tensors on the GPU
copies less. The report is written beside the engine, with the command line, the GPU, its clocks and memory, and all versions.
"""

import argparse
import json
import logging
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine import backend, clocks, compatibility, host_cost
from engine.backend import EngineError, Gpu
from engine.session import Session
from engine.typical_frame import typical_inputs
from qdbev import artifact
from qdbev.artifact import Seal
from qdbev.command import entry_point
from qdbev.config import from_dict

_log = logging.getLogger(__name__)
_TOOLS: dict[str, str] = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
"""Name of the measuring program of each TensorRT."""
_TRANSFERS_OPTIONAL_FROM = (11, 0)
"""First version whose trtexec copies inputs and outputs only with --includeDataTransfers."""
_WARM_UP_MS = 1000
"""Milliseconds for which frames run before the first one is measured."""
_TOOL_LIMIT_S = 1800.0
"""Seconds that trtexec may take; 2000 frames of the largest recipe take minutes."""


class Times(NamedTuple):
    """Milliseconds of each frame, the program that measured them, and its command line."""

    compute: list[float]
    with_transfers: list[float]
    tool: str
    command: str


def bench(engine: Path, iterations: int) -> dict[str, Any]:
    """Measure an engine over `iterations` frames and return the report.

    Raises:
        ArtifactError: The engine is missing, damaged or not sealed.
        EngineError: There is no GPU, the engine cannot run here, or trtexec fails.
    """
    seal = artifact.unseal(engine, "engine")
    device = backend.require_gpu(f"measuring {engine}")
    compatibility.require_gpu(engine, seal, device)
    config, interface = from_dict(seal.config), seal.facts.interface
    frame = typical_inputs(config, interface)
    tool = shutil.which(_TOOLS[seal.facts.backend.name])
    with clocks.watch(device.bus_id) as seen:
        times = _with_tool(tool, engine, seal, frame, iterations) if tool else _with_session(engine, frame, iterations)
    host = host_cost.measure(config, interface)
    return report(engine, seal, device, times, host, seen)


def report(engine: Path, seal: Seal, device: Gpu, times: Times, host: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON values, in the same form whichever program measured.

    Args:
        host: Milliseconds on the host, as `host_cost.measure` returns them.
        seen: Clocks, power and memory of the GPU, as `clocks.watch` returns them.
    """
    runs = len(times.with_transfers)
    before, after = (np.resize(host[name], runs) for name in ("before", "after"))
    return {
        "compute": statistics(times.compute),
        "with_transfers": statistics(times.with_transfers),
        "with_host": statistics(list(before + np.array(times.with_transfers) + after)),
        "host": {
            "before": statistics(host["before"]),
            "after": statistics(host["after"]),
            "camera_hw": host["camera_hw"],
        },
        "tool": times.tool,
        "command": times.command,
        "gpu": {"name": device.name, "compute_capability": device.compute_capability, **seen},
        "engine": {"name": engine.name, "sha256": seal.sha256, "bytes": seal.facts.plan_bytes, **asdict(seal.facts.backend)},
        "made": artifact.provenance(),
    }


def statistics(times_ms: list[float]) -> dict[str, float | int]:
    """Percentiles of the time per frame in milliseconds, and frames per second at the mean time."""
    if not len(times_ms):
        raise EngineError("no frame was measured; use more --iterations")
    p50, p90, p99, p99_9 = np.percentile(times_ms, (50, 90, 99, 99.9))
    mean = float(np.mean(times_ms))
    return {
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "p99_9_ms": float(p99_9),
        "mean_ms": mean,
        "frames_per_s": 1000 / mean,
        "runs": len(times_ms),
    }


def report_path(engine: Path) -> Path:
    """Path of the measurement report of `engine`."""
    return engine.with_name(engine.name + ".bench.json")


def tool_command(tool: str, engine: Path, seal: Seal, iterations: int, folder: Path) -> list[str]:
    """The command line with which trtexec measures `iterations` frames one after the other, copies included, with a CUDA graph.

    `folder` contains each input as NAME.bin; trtexec writes times.json there.
    """
    made_by = seal.facts.backend
    files = ",".join(f"{name}:{folder / name}.bin" for name in seal.facts.interface.inputs)
    command = [tool, f"--loadEngine={engine}", f"--loadInputs={files}", f"--iterations={iterations}", "--duration=0"]
    command += [f"--warmUp={_WARM_UP_MS}", "--exposeDMA", "--useSpinWait", "--useCudaGraph", f"--exportTimes={folder / 'times.json'}"]
    if made_by.name == "tensorrt" and backend.release(made_by.version) >= _TRANSFERS_OPTIONAL_FROM:
        command.append("--includeDataTransfers")
    return command


def read_times(text: str) -> tuple[list[float], list[float]]:
    """Milliseconds of each frame in the file that trtexec wrote for --exportTimes: GPU time, and GPU time with copies.

    Raises:
        EngineError: The text has another form.
    """
    try:
        rows = json.loads(text)
        return [float(row["computeMs"]) for row in rows], [float(row["latencyMs"]) for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EngineError(f"trtexec's times cannot be read ({error!r}); they begin {text[:120]!r}") from error


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


def _with_session(engine: Path, frame: dict[str, np.ndarray], iterations: int) -> Times:
    compute, with_transfers = [], []
    with Session(engine) as session:
        begin = time.perf_counter()
        while len(compute) < iterations:
            started = time.perf_counter()
            session.infer(frame)
            ended = time.perf_counter()
            if 1e3 * (ended - begin) > _WARM_UP_MS:
                compute.append(session.compute_ms())
                with_transfers.append(1e3 * (ended - started))
    return Times(compute, with_transfers, "session", f"python -m engine.bench --engine {engine} --iterations {iterations}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description="Measure the time an engine takes for a frame.")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, help="ONNX that the engine must have been built from")
    parser.add_argument("--iterations", type=int, default=2000, help="frames to measure (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="report as JSON (default: beside the engine)")
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure an engine and write the report."""
    args = parse_args(argv)
    if args.onnx:
        artifact.expect_parent(args.engine, artifact.unseal(args.engine, "engine"), args.onnx, artifact.unseal(args.onnx, "onnx"))
    found = bench(args.engine, args.iterations)
    with artifact.atomic(args.out or report_path(args.engine)) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    _log.info("%s on %s, by %s", args.engine, found["gpu"]["name"], found["tool"])
    for name in ("compute", "with_transfers", "with_host"):
        _log.info("%-15s p50 %8.3f ms, p90 %8.3f, p99 %8.3f, p99.9 %8.3f; %.1f frames/s over %d runs",
                  name, *(found[name][key] for key in ("p50_ms", "p90_ms", "p99_ms", "p99_9_ms", "frames_per_s", "runs")))  # fmt: skip


if __name__ == "__main__":
    main()
