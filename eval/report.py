"""All evaluated models of a run in one table: what each stage cost or kept.

    python -m eval.report --run runs/demo

Reads the metrics.json of every folder in eval/ and the audits of the engines; writes summary.json, where `rows` are the evaluated
models (`seconds` is the model's median for one frame) and `engines` what the audits counted.
"""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.nds import EvaluationError
from qdbev import artifact
from qdbev.command import entry_point

SUMMARY = "summary.json"
_MEANS = ("nds", "map", "mate", "mase", "maoe", "mave", "maae")
_STAGES = ("teacher", "student", "packed", "onnx", "engine")
_AUDIT = ("summary", "quantized_layers", "int8_layers", "kernels", "int8_kernels", "requantizations")
_log = logging.getLogger(__name__)
Row = dict[str, Any]


def collect(run: Path) -> list[Row]:
    """One row per evaluated model, in the order of the stages.

    Raises:
        EvaluationError: The run holds no metrics.
        ArtifactError: A metrics file was altered, or has no seal.
    """
    paths = sorted(run.glob("eval/*/metrics.json"))
    if not paths:
        raise EvaluationError(f"{run} has no eval/*/metrics.json; run `python -m eval.run --model {run / 'teacher.pt'}` first")
    rows = [_row(path) for path in paths]
    by_sha = {(row["sha256"], *row["data"].values()): row for row in rows}
    for row in rows:
        parent = by_sha.get((row["parent_sha256"], *row["data"].values()))
        row["parent"] = parent["name"] if parent else None
        row["nds_from_parent"] = row["nds"] - parent["nds"] if parent else None
    return sorted(rows, key=lambda row: (_STAGES.index(row["kind"]), row["name"]))


def engines(run: Path) -> list[Row]:
    """What the audit of each engine counted, without its rows.

    Raises:
        EvaluationError: An audit cannot be read.
    """
    found = []
    for path in sorted(run.glob("*.engine.audit.json")):
        engine = path.with_name(path.name.removesuffix(".audit.json"))
        size = engine.stat().st_size if engine.is_file() else None
        found.append({"name": engine.name, "bytes": size, **_audit(path)})
    return found


def save(run: Path, rows: list[Row], audits: list[Row]) -> Path:
    """Write summary.json of a run, whole or not at all."""
    path = run / SUMMARY
    content = {"made": artifact.provenance(), "cpu_cores": os.cpu_count(), "rows": rows, "engines": audits}
    with artifact.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def table(rows: list[Row]) -> Table:
    """The evaluated models for the terminal, in 80 columns. `vs` is the NDS against that of the parent."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("model", no_wrap=True)
    for title in ("NDS", "vs", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "MB", "ms"):
        grid.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        change = "" if row["nds_from_parent"] is None else f"{row['nds_from_parent']:+.3f}"
        errors = [f"{row[name]:.2f}" for name in _MEANS[2:]]
        size, milliseconds = f"{row['bytes'] / 1e6:.2f}", f"{1e3 * row['seconds']:.0f}"
        grid.add_row(row["name"], f"{row['nds']:.3f}", change, f"{row['map']:.3f}", *errors, size, milliseconds)
    return grid


def engine_table(audits: list[Row]) -> Table:
    """The engines for the terminal, in 80 columns."""
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("engine", no_wrap=True)
    for title in ("quantized layers", "in INT8", "kernels", "integer products", "requantizations", "MB"):
        grid.add_column(title, justify="right")
    for audit in audits:
        size = "" if audit["bytes"] is None else f"{audit['bytes'] / 1e6:.2f}"
        grid.add_row(audit["name"], *(str(audit[name]) for name in _AUDIT[1:]), size)
    return grid


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description="Compare all evaluated models of a run.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, as runs/demo")
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Metrics in, table and summary out."""
    args = parse_args(argv)
    rows, audits = collect(args.run), engines(args.run)
    path = save(args.run, rows, audits)
    console = Console()
    console.print(table(rows))
    if audits:
        console.print(engine_table(audits))
    splits = sorted({f"{row['data']['split']} of {row['data']['version']}" for row in rows})
    if len(splits) > 1:
        _log.warning("warning: rows are of different splits (%s) and do not compare", ", ".join(splits))
    _log.info("%s", path)


def _row(path: Path) -> Row:
    artifact.unseal(path, "metrics")
    metrics = json.loads(path.read_text())
    fields = ("kind", *_MEANS, "bytes", "frames", "data", "model", "sha256", "parent_sha256", "class_ap", "absent")
    seconds = metrics["seconds"]
    row = {"name": path.parent.name, **{name: metrics[name] for name in fields}}
    return row | {"seconds": seconds["model"], "seconds_with_data": seconds["frame"]}


def _audit(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        return {name: content[name] for name in _AUDIT}
    except (json.JSONDecodeError, KeyError) as error:
        raise EvaluationError(f"{path} is damaged ({error!r}); make it again with `python -m engine.audit`") from error


if __name__ == "__main__":
    main()
