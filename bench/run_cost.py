"""What ONNX files of the same network cost in onnxruntime: `python -m bench.run_cost --onnx base.onnx base_standard.onnx`.

Each file has a process of its own, which opens it and runs a second frame of noise when told to; the files take turns, so that the
ratios hold on a busy machine.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from export.runner import OnnxRunner
from qdbev import artifact
from qdbev.command import entry_point


def measure(paths: list[Path], turns: int) -> list[dict[str, Any]]:
    """For each file: median seconds of a run, the median of its ratios to the first file's, and peak memory.

    Raises:
        ArtifactError: A file is missing, altered or cannot be run.
    """
    for path in paths:
        artifact.unseal(path, "onnx")
    context = multiprocessing.get_context("spawn")
    links, workers = [], []
    for path in paths:
        ours, theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(path, theirs), daemon=True)
        worker.start()
        theirs.close()
        links.append(ours)
        workers.append(worker)
    seconds = [[_ask(link, path) for path, link in zip(paths, links, strict=True)] for _ in tqdm(range(turns + 1), disable=None)][1:]
    peaks = [_ask(link, path, last=True) for path, link in zip(paths, links, strict=True)]
    for worker in workers:
        worker.join()
    by_file = list(zip(*seconds, strict=True))
    return [
        {
            "file": path.name,
            "seconds": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, by_file[0], strict=True)),
            "peak_memory_mb": round(peak),
        }
        for path, own, peak in zip(paths, by_file, peaks, strict=True)
    ]


def _ask(link: Connection, path: Path, last: bool = False) -> float:
    try:
        link.send(last)
        return link.recv()
    except EOFError as error:
        raise artifact.ArtifactError(f"the process that ran {path} ended; it may need more memory than there is") from error


def _serve(path: Path, link: Connection) -> None:
    """Run the file once for every False received, answering with seconds; answer True with the peak memory in MB, and end."""
    runner = OnnxRunner(path)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in runner.shapes.items()}
    feeds["has_prev"] = np.ones_like(feeds["has_prev"])
    while not link.recv():
        start = time.perf_counter()
        runner(feeds)
        link.send(time.perf_counter() - start)
    link.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compare the cost of ONNX files in onnxruntime."""
    parser = argparse.ArgumentParser(prog="python -m bench.run_cost", description=main.__doc__)
    parser.add_argument("--onnx", type=Path, nargs="+", required=True, help="files of one network; ratios are to the first")
    parser.add_argument("--turns", type=int, default=5, help="runs of each file that count (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    rows = measure(args.onnx, args.turns)
    content = {"turns": args.turns, "cpu_cores": os.cpu_count(), "rows": rows, "made": artifact.provenance()}
    if args.out:
        with artifact.atomic(args.out) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        sys.stdout.write(f"{row['file']:<28}{row['seconds']:>9.2f} s{row['ratio']:>7.2f}x{row['peak_memory_mb']:>8} MB\n")


if __name__ == "__main__":
    main()
