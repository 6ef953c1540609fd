"""How fast an engine is.

    python -m engine.bench --engine runs/demo/w8a8.engine

Runs trtexec (tensorrt_rtx for TensorRT-RTX) where it is on PATH, else `engine.session`; both report the GPU time of a frame without
copies, in the same form. The report lies beside the engine and carries the command line, the GPU and all versions.
"""

import argparse
import json
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine import backend
from engine.backend import EngineError
from engine.session import Session
from qdbev import artifact
from qdbev.command import entry_point

_log = logging.getLogger(__name__)
_TOOLS: dict[str, str] = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
_WARM_UP_MS = 1000


def bench(engine: Path, iterations: int) -> dict[str, Any]:
    """Measure an engine.

    Raises:
        ArtifactError: It is missing, damaged or not sealed.
        EngineError: There is no GPU, or the engine cannot run here.
    """
    seal = artifact.unseal(engine, "engine")
    device = backend.require_gpu(f"measuring {engine}")
    tool = shutil.which(_TOOLS[seal.facts["backend"]["name"]])
    times, command = _with_tool(tool, engine, iterations) if tool else _with_session(engine, iterations)
    return {
        **statistics(times),
        "command": command,
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "engine": {"name": engine.name, "sha256": seal.sha256, **seal.facts["backend"]},
        "made": artifact.provenance(),
    }


def statistics(times_ms: list[float]) -> dict[str, float | int]:
    """Percentiles of GPU time a frame in milliseconds, and frames a second at the mean."""
    if not times_ms:
        raise EngineError("the measurement gave no times; raise --iterations")
    p50, p90, p99 = np.percentile(times_ms, (50, 90, 99))
    mean = float(np.mean(times_ms))
    return {
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "mean_ms": mean,
        "frames_per_s": 1000 / mean,
        "runs": len(times_ms),
    }


def report_path(engine: Path) -> Path:
    """Where the measurement of `engine` lies."""
    return engine.with_name(engine.name + ".bench.json")


def _with_tool(tool: str, engine: Path, iterations: int) -> tuple[list[float], str]:
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        command = [tool, f"--loadEngine={engine}", f"--iterations={iterations}", "--duration=0", f"--warmUp={_WARM_UP_MS}"]
        command += ["--noDataTransfers", "--useSpinWait", f"--exportTimes={times}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not times.is_file():
            last = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise EngineError(f"`{' '.join(command)}` ended with {done.returncode}:\n  {last}")
        return [float(row["computeMs"]) for row in json.loads(times.read_text())], " ".join(command)


def _with_session(engine: Path, iterations: int) -> tuple[list[float], str]:
    with Session(engine) as session:
        warm = 0.0
        while warm < _WARM_UP_MS:
            warm += max(session.compute_ms(), 0.01)
        return [session.compute_ms() for _ in range(iterations)], f"python -m engine.bench --engine {engine} --iterations {iterations}"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description="Measure an engine's GPU time a frame.")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--onnx", type=Path, help="refuse the engine if it was built from another file")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--out", type=Path, help="report as JSON (default: beside the engine)")
    return parser.parse_args(arguments)


@entry_point
def main(arguments: list[str] | None = None) -> None:
    """Engine in, latency out."""
    args = parse_args(arguments)
    if args.onnx:
        artifact.expect_parent(args.engine, artifact.unseal(args.engine, "engine"), args.onnx, artifact.unseal(args.onnx, "onnx"))
    report = bench(args.engine, args.iterations)
    with artifact.atomic(args.out or report_path(args.engine)) as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    _log.info("%s on %s: p50 %.3f ms, p90 %.3f ms, p99 %.3f ms, %.1f frames/s over %d runs",
              args.engine, report["gpu"], *(report[key] for key in ("p50_ms", "p90_ms", "p99_ms", "frames_per_s", "runs")))  # fmt: skip


if __name__ == "__main__":
    main()
