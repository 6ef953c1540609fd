"""Collects the measurements in the seals of a run's ONNX files and engines: `python -m bench.sizes --run runs/sizes`.

Writes sizes.json with parity with PyTorch, trace time and peak memory of each export, and the counts of each engine's audit.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import report
from qdbev import artifact
from qdbev.command import entry_point

FILE = "sizes.json"
"""Name of the file that is written into the folder of the run."""
_PARITY = ("bev", "box_code", "cls_logits")


def collect(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the facts in the seals of a run's files: `onnx` has a row for each ONNX file, `engines` a row for each engine.

    Raises:
        ArtifactError: There is no ONNX, or a file has changed since it was sealed.
    """
    files = [path for path in sorted(run.glob("*.onnx")) if not path.name.endswith(".int4.onnx")]
    if not files:
        raise artifact.ArtifactError(f"{run} holds no .onnx file; make them with `make sizes` or `python -m export.to_onnx`")
    onnx = [{"name": path.stem, **asdict(artifact.unseal(path, "onnx").facts)} for path in files]
    engines = [{"name": path.stem, **asdict(artifact.unseal(path, "engine").facts)} for path in sorted(run.glob("*.engine"))]
    return {"onnx": onnx, "engines": engines}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The rows as aligned lines of text."""
    lines = [f"{'ONNX':<14}{'nodes':>6}{'MB':>7}{'trace s':>9}{'peak GB':>9}" + "".join(f"{name:>12}" for name in _PARITY) + "  (max abs)"]
    for row in rows["onnx"]:
        parity = "".join(f"{row['parity'][f'{name}_max_abs']:>12.1e}" for name in _PARITY)
        peak = row["peak_memory_mb"] / 1024
        lines.append(f"{row['name']:<14}{row['nodes']:>6}{row['bytes'] / 1e6:>7.1f}{row['trace_s']:>9.1f}{peak:>9.1f}{parity}")
    for row in rows["engines"]:
        audit = row["audit"]
        quantized = f"{audit['int8_layers']} of {audit['quantized_layers']} quantized layers in INT8, {audit['kernels']} kernels"
        lines.append(f"{row['name']}.engine: {quantized}, {row['plan_bytes'] / 1e6:.1f} MB, built in {row['build_seconds']} s")
    return "\n".join(lines)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Collect the measurements of a run's exports and engines."""
    parser = argparse.ArgumentParser(prog="python -m bench.sizes", description=main.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder with .onnx and .engine files")
    run = parser.parse_args(argv).run
    rows = collect(run)
    report.write(run / FILE, {"cpu_cores": os.cpu_count(), **rows})
    sys.stdout.write(f"{table(rows)}\n{run / FILE}\n")


if __name__ == "__main__":
    main()
