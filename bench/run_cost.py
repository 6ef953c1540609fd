"""Measures time and memory of the files of one network on this CPU, beside each other.

    python -m bench.run_cost --models runs/demo/teacher.pt runs/demo/teacher.onnx runs/demo/teacher.cpu.engine runs/demo/w4a6.cpu.engine

Checkpoints run in PyTorch, ONNX files in onnxruntime, engines in OpenVINO. Each file is opened and run in a process of its own. The files
take turns, so that their ratios are also right on a busy machine.
"""

import argparse
import atexit
import dataclasses
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench import report
from bench.worker import Worker, WorkerError
from engine import cpu
from engine.typical_frame import typical_inputs
from eval.open_model import open_model
from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.command import entry_point

SHARE_OF_MEMORY = 0.9
"""Share of the machine's memory that the process of one file may take before it is ended."""
RUN_LIMIT_S = 1800.0
"""Seconds that one run of one file may take before its process is ended; the first run includes opening the file."""


class Cost(NamedTuple):
    """Seconds of one run, peak memory of the process in MB, and number of layers that an engine runs on integers."""

    seconds: float
    peak_memory_mb: float
    int8_layers: int


def measure(paths: list[Path], turns: int, threads: int | None = None) -> list[dict[str, Any]]:
    """Measure each file: median seconds of a run, median of its ratios to the first file, and peak memory in MB.

    `threads` is the number of threads and of CPU cores that each file gets, all cores if None.

    Raises:
        ArtifactError: A file is missing or altered, cannot be run here, or exceeds the limit of memory or time.
    """
    limit = int(SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    runs: list[list[Cost]] = [[] for _ in paths]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(_prepare, path, threads)) for path in paths]
        for _ in tqdm(range(turns + 1), disable=None):
            for path, worker, found in zip(paths, workers, runs, strict=True):
                try:
                    found.append(Cost(*worker.run(limit, RUN_LIMIT_S)))
                except WorkerError as error:
                    raise ArtifactError(f"{path} cannot be measured: {error}") from error
    seconds = [[cost.seconds for cost in found[1:]] for found in runs]  # the first run is a warm-up
    return [
        {
            "file": path.name,
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, seconds[0], strict=True)),
            "peak_memory_mb": round(found[-1].peak_memory_mb),
            "int8_layers": found[-1].int8_layers,
        }
        for path, own, found in zip(paths, seconds, runs, strict=True)
    ]


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say whether integers pay on this CPU, from the rows of engines of one network in float and on integers; empty without both."""
    engines = [row for row in rows if row["file"].endswith(".engine")]
    in_float = [row["seconds"] for row in engines if not row["int8_layers"]]
    integer = [row["seconds"] for row in engines if row["int8_layers"]]
    if not in_float or not integer:
        return ""
    gain = min(in_float) / min(integer)
    answer = "pay" if gain > 1 else "do not pay"
    return f"integers {answer} on this CPU: the fastest integer engine takes 1/{gain:.2f} of the time of the float engine"


def _prepare(path: Path, threads: int | None) -> Callable[[], Cost]:
    """Open the file; the returned function runs the second frame of a scene."""
    if threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        torch.set_num_threads(threads)
    stack = ExitStack()
    model = stack.enter_context(open_model(path))
    atexit.register(stack.close)
    facts = model.seal.facts
    interface = facts.interface if hasattr(facts, "interface") else model.config.model.interface(facts.image_hw)
    inputs, int8_layers = typical_inputs(model.config, interface), getattr(facts, "audit", {}).get("int8_layers", 0)

    def run() -> Cost:
        start = time.perf_counter()
        model.run(inputs)
        return Cost(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, int8_layers)

    return run


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compare the time and memory of the files of one network on this CPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.run_cost", description=main.__doc__)
    models = ".pt, .onnx and .engine files of one network; ratios are to the first"
    parser.add_argument("--models", type=Path, nargs="+", required=True, help=models)
    parser.add_argument("--turns", type=int, default=5, help="counted runs of each file (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of each (default: all cores)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    artifact.require_target(args.out, *args.models)
    if args.turns < 1 or (args.threads is not None and args.threads < 1):
        raise ArtifactError(f"--turns {args.turns} and --threads {args.threads} must be at least 1")
    rows = measure(args.models, args.turns, args.threads)
    hardware = {**dataclasses.asdict(cpu.this_cpu()), "cores": os.cpu_count(), "threads": args.threads or os.cpu_count()}
    report.write(args.out, {"turns": args.turns, "cpu": hardware, "rows": rows, "verdict": verdict(rows)})
    for row in rows:
        sys.stdout.write(f"{row['file']:<28}{1e3 * row['seconds']:>10.1f} ms{row['ratio']:>7.2f}x{row['peak_memory_mb']:>8} MB\n")
    if verdict(rows):
        sys.stdout.write(f"{verdict(rows)}\n")


if __name__ == "__main__":
    main()
