"""Puts all evaluated models of a run into one table, which shows what each stage lost or kept.

    python -m eval.report --run runs/demo

Reads the metrics.json of every folder in eval/ and the audits of the engines. Writes summary.json: `rows` are the evaluated models
(`seconds` is the model's median time for one frame), `engines` the counts of the audits.
"""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from eval.nds import MEANS, EvaluationError
from qdbev import artifact
from qdbev.command import entry_point

_STAGES = ("teacher", "student", "packed", "onnx", "engine")
"""Kinds of models in the order of the pipeline."""
_AUDIT = ("summary", "quantized_layers", "int8_layers", "kernels", "int8_kernels", "requantizations")
"""Entries of an engine's audit that the summary contains."""
_log = logging.getLogger(__name__)
Row = dict[str, Any]
"""Figures of one evaluated model or of one engine, as JSON values."""


def collect(run: Path) -> list[Row]:
    """Read metrics, size, speed and parent of every evaluated model of a run, in the order of the pipeline.

    Raises:
        EvaluationError: The run has no metrics.
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
    """Read name, size and audit counts of every engine of a run. Raises EvaluationError if an audit cannot be read."""
    found = []
    for path in sorted(run.glob("*.engine.audit.json")):
        engine = path.with_name(path.name.removesuffix(".audit.json"))
        size = engine.stat().st_size if engine.is_file() else None
        try:
            content = json.loads(path.read_text())
            counts = {name: content[name] for name in _AUDIT}
        except (json.JSONDecodeError, KeyError) as error:
            raise EvaluationError(f"{path} is damaged ({error!r}); make it again with `python -m engine.audit`") from error
        found.append({"name": engine.name, "bytes": size, **counts})
    return found


def save(run: Path, rows: list[Row], audits: list[Row]) -> Path:
    """Write summary.json into the folder of a run and return its path."""
    path = run / "summary.json"
    content = {"made": artifact.provenance(), "cpu_cores": os.cpu_count(), "rows": rows, "engines": audits}
    with artifact.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def table(rows: list[Row]) -> Table:
    """A table of the evaluated models for a terminal of 80 columns. The column `vs` is the change of the NDS from the parent's."""
    titles = ("NDS", "vs", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE", "MB", "ms")
    grid = _grid("model", *(Column(title, justify="right", no_wrap=True) for title in titles))
    for row in rows:
        change = "" if row["nds_from_parent"] is None else f"{row['nds_from_parent']:+.3f}"
        errors = [f"{row[name]:.2f}" for name in MEANS[2:]]
        size, milliseconds = f"{row['bytes'] / 1e6:.2f}", f"{1e3 * row['seconds']:.0f}"
        grid.add_row(row["name"], f"{row['nds']:.3f}", change, f"{row['map']:.3f}", *errors, size, milliseconds)
    return grid


def engine_table(audits: list[Row]) -> Table:
    """A table of the engines for a terminal of 80 columns."""
    titles = ("quantized layers", "in INT8", "kernels", "integer products", "requantizations", "MB")
    grid = _grid("engine", *(Column(title, justify="right") for title in titles))
    for audit in audits:
        size = "" if audit["bytes"] is None else f"{audit['bytes'] / 1e6:.2f}"
        grid.add_row(audit["name"], *(str(audit[name]) for name in _AUDIT[1:]), size)
    return grid


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Print the table of a run and write its summary."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description="Compare all evaluated models of a run.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, such as runs/demo")
    args = parser.parse_args(argv)
    rows, audits = collect(args.run), engines(args.run)
    path = save(args.run, rows, audits)
    console = Console()
    console.print(table(rows))
    if audits:
        console.print(engine_table(audits))
    splits = sorted({f"{row['data']['split']} of {row['data']['version']}" for row in rows})
    if len(splits) > 1:
        _log.warning("warning: the rows come from different splits (%s) and cannot be compared", ", ".join(splits))
    _log.info("%s", path)


def _grid(name: str, *figures: Column) -> Table:
    return Table(Column(name, no_wrap=True), *figures, box=None, padding=(0, 1, 0, 0), pad_edge=False)


def _row(path: Path) -> Row:
    artifact.unseal(path, "metrics")
    metrics = json.loads(path.read_text())
    fields = ("kind", *MEANS, "bytes", "frames", "data", "model", "sha256", "parent_sha256", "class_ap", "absent")
    seconds = {"seconds": metrics["seconds"]["model"], "seconds_with_data": metrics["seconds"]["frame"]}
    return {"name": path.parent.name, **{name: metrics[name] for name in fields}, **seconds}


if __name__ == "__main__":
    main()
