"""Measures time and memory of ONNX files of one network in onnxruntime: `python -m bench.run_cost --onnx base.onnx base_standard.onnx`.

Each file is opened and run in a process of its own. The files take turns, so that their ratios are also right on a busy machine.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import report
from bench.worker import Worker, WorkerError
from engine.typical_frame import typical_inputs
from export.runner import OnnxRunner
from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.command import entry_point
from qdbev.config import from_dict

SHARE_OF_MEMORY = 0.9
"""Share of the machine's memory that the process of one file may take before it is ended."""
RUN_LIMIT_S = 1800.0
"""Seconds that one run of one file may take before its process is ended; the first run includes opening the file."""


def measure(paths: list[Path], turns: int) -> list[dict[str, Any]]:
    """Measure each file: median seconds of a run, median of its ratios to the first file, and peak memory in MB.

    Raises:
        ArtifactError: A file is missing or altered, cannot be run, or exceeds the limit of memory or time.
    """
    for path in paths:
        artifact.unseal(path, "onnx")
    limit = int(SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    runs: list[list[tuple[float, float]]] = [[] for _ in paths]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(_prepare, path)) for path in paths]
        for _ in tqdm(range(turns + 1), disable=None):
            for path, worker, found in zip(paths, workers, runs, strict=True):
                try:
                    found.append(worker.run(limit, RUN_LIMIT_S))
                except WorkerError as error:
                    raise ArtifactError(f"{path} cannot be measured: {error}") from error
    seconds = [[second for second, _ in found[1:]] for found in runs]  # the first run is a warm-up
    return [
        {
            "file": path.name,
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, seconds[0], strict=True)),
            "peak_memory_mb": round(found[-1][1]),
        }
        for path, own, found in zip(paths, seconds, runs, strict=True)
    ]


def _prepare(path: Path) -> Callable[[], tuple[float, float]]:
    """Open the file; the returned function runs the second frame of a scene and returns seconds and the process's peak memory in MB."""
    runner = OnnxRunner(path)
    inputs = typical_inputs(from_dict(artifact.unseal(path, "onnx").config), runner.interface)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        runner(inputs)
        return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    return run


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compare the time and memory of ONNX files in onnxruntime."""
    parser = argparse.ArgumentParser(prog="python -m bench.run_cost", description=main.__doc__)
    parser.add_argument("--onnx", type=Path, nargs="+", required=True, help="files of one network; ratios are to the first")
    parser.add_argument("--turns", type=int, default=5, help="counted runs of each file (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    artifact.require_target(args.out, *args.onnx)
    rows = measure(args.onnx, args.turns)
    report.write(args.out, {"turns": args.turns, "cpu_cores": os.cpu_count(), "rows": rows})
    for row in rows:
        sys.stdout.write(f"{row['file']:<28}{row['seconds']:>9.2f} s{row['ratio']:>7.2f}x{row['peak_memory_mb']:>8} MB\n")


if __name__ == "__main__":
    main()
