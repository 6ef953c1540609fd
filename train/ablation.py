"""Every row of the method's ablation, trained and evaluated, cell by cell: `python -m train.ablation --teacher runs/demo/teacher.pt`.

A cell is a row at a width with a seed; it is one command of `train.qat` and one of `eval.run`, and is skipped where its metrics already
lie in the folder. The rows are those of QD-BEV's Tables 1 and 3 and Figure 5 (arXiv:2308.10515) and what we compare them with; rows that
train have equal epochs in all. Results: rows.<row>.<width>.nds and .map, lists over seeds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qdbev import artifact
from qdbev.command import entry_point
from qdbev.config import GROUPS, QuantConfig

EPOCHS = 1.0
RATE = 1e-4
_PARTS = (0.2, 0.1, 0.2, 0.1)
"""Epochs of the progressive stages; the rest up to EPOCHS is the last stage."""
_FLOAT_LAYERS = QuantConfig().float_layers


class AblationError(ValueError):
    """A cell that cannot be run."""


@dataclass(frozen=True)
class Row:
    """One row: settings of `train.qat`, and whether it trains (and so has several seeds at the stress width)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    trains: bool = True
    mixed: bool = False


def _stage(share: float, groups: tuple[str, ...] = GROUPS, distill: bool = False) -> dict[str, Any]:
    return {"groups": list(groups), "epochs": share * EPOCHS, "learning_rate": RATE, "distill": distill}


def _stages(progressive: bool, distill: bool) -> list[dict[str, Any]]:
    if not progressive:
        return [_stage(1.0, distill=distill)]
    parts = (GROUPS[:1], GROUPS[:2], GROUPS[:3], GROUPS)
    last = round(1.0 - sum(_PARTS), 6)
    return [*(_stage(share, groups) for share, groups in zip(_PARTS, parts, strict=True)), _stage(last, distill=distill)]


def _calibrated(**settings: Any) -> dict[str, Any]:
    return {"quant.stages": [], **{f"quant.{name}": value for name, value in settings.items()}}


def _trained(progressive: bool, distill: bool = False, **settings: Any) -> dict[str, Any]:
    return {"quant.stages": _stages(progressive, distill), **{f"quant.{name}": value for name, value in settings.items()}}


def _distilled(form: str, **settings: Any) -> dict[str, Any]:
    return _trained(True, distill=True) | {f"quant.distill.{name}": value for name, value in {"form": form, **settings}.items()}


def _alone(*groups: str) -> list[str]:
    """Float layers that leave only `groups` quantized."""
    return [*_FLOAT_LAYERS, *(f"{group}.*" for group in GROUPS if group not in groups)]


MODULES = {"backbone": ("backbone",), "neck": ("neck",), "encoder": ("encoder",), "decoder": ("decoder", "head")}
"""The four parts of the paper's Table 1; it counts the head with the decoder."""

ROWS = (
    Row("float_more", {"quant.stages": [_stage(1.0, ())]}),
    Row("ptq_max_tensor", _calibrated(calibration="max", per_channel=False), trains=False),
    Row("ptq_max", _calibrated(calibration="max"), trains=False),
    Row("ptq_mse", _calibrated(), trains=False),
    *(Row(f"ptq_{name}", _calibrated(float_layers=_alone(*groups)), trains=False) for name, groups in MODULES.items()),
    Row("qat_fixed", _trained(False, scale="fixed")),
    Row("qat_fixed_progressive", _trained(True, scale="fixed")),
    Row("qat", _trained(False)),
    Row("qat_progressive", _trained(True)),
    Row("distill_image", _distilled("image")),
    Row("distill_bev", _distilled("bev")),
    Row("vgd", _distilled("product")),
    Row("vgd_best", _distilled("guided", head=1.0)),
    Row("mixed", _trained(False), mixed=True),
)


@dataclass(frozen=True)
class Cell:
    """A row at a width with a seed, and its folder."""

    row: Row
    width: str
    seed: int
    folder: Path

    @property
    def student(self) -> Path:
        """The checkpoint."""
        return self.folder / "student.pt"

    @property
    def metrics(self) -> Path:
        """What makes the cell done."""
        return self.folder / "eval" / "metrics.json"


def cells(run: Path, stress: str, names: list[str], seeds: int) -> Iterator[Cell]:
    """All cells of the named rows: 8 bits by calibration only, W4A6 with one seed, the stress width with `seeds`.

    Raises:
        AblationError: A row does not exist.
    """
    unknown = sorted(set(names) - {row.name for row in ROWS})
    if unknown:
        raise AblationError(f"no rows {', '.join(unknown)}; there are {', '.join(row.name for row in ROWS)}")
    for row in (row for row in ROWS if not names or row.name in names):
        widths = (["w8a8"] if row.name == "ptq_mse" else []) + (["w8a8"] if row.name == "float_more" else ["w4a6", stress])
        for width in widths:
            for seed in range(seeds if row.trains and width in (stress, "w8a8") else 1):
                yield Cell(row, width, seed, run / row.name / width / f"seed{seed}")


def commands(cell: Cell, teacher: Path) -> list[list[str]]:
    """Arguments of the processes that make the cell's metrics, in order."""
    settings = [f"{name}={value!r}" if not isinstance(value, str) else f"{name}={value}" for name, value in cell.row.settings.items()]
    sets = [part for setting in (*settings, f"seed={cell.seed}") for part in ("--set", setting)]
    common = ["--teacher", str(teacher), "--bits", cell.width]
    widths = cell.folder.parent / "widths.json"
    first = [["train.sensitivity", *common, "--budget", "size", "--out", str(widths)]] if cell.row.mixed and not widths.is_file() else []
    chosen = ["--widths", str(widths)] if cell.row.mixed else []
    resume = ["--resume"] if any(cell.folder.glob("*.state.pt")) else []
    train = ["train.qat", *common, "--student", str(cell.student), *chosen, *resume, *sets]
    return [*first, train, ["eval.run", "--model", str(cell.student), "--out", str(cell.metrics.parent)]]


def run_cell(cell: Cell, teacher: Path) -> None:
    """Train and evaluate a cell; output goes to its log.

    Raises:
        AblationError: A command fails.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    log = cell.folder / "log.txt"
    begin = time.monotonic()
    for command in commands(cell, teacher):
        with log.open("a") as file:
            done = subprocess.run([sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise AblationError(f"python -m {command[0]} failed in {cell.folder}; see {log}")
    (cell.folder / "seconds.json").write_text(json.dumps(round(time.monotonic() - begin, 1)))
    for state in cell.folder.glob("*.state.pt"):
        state.unlink()


def collect(run: Path, teacher_metrics: Path, stress: str) -> dict[str, Any]:
    """Everything measured so far, in the form of results/ablation_micro.json."""
    rows: dict[str, Any] = {"float": {"w8a8": _scores([teacher_metrics])}} if teacher_metrics.is_file() else {}
    for row in ROWS:
        for width in ("w8a8", "w4a6", stress):
            found = sorted((run / row.name / width).glob("seed*/eval/metrics.json"))
            if found:
                rows.setdefault(row.name, {})["stress" if width == stress else width] = _scores(found)
    seconds = sum(json.loads(path.read_text()) for path in run.glob("*/*/*/seconds.json"))
    about = {"stress": stress, "epochs": EPOCHS, "seconds": seconds, "cpu_cores": os.cpu_count()}
    return {**about, "rows": rows, "made": artifact.provenance()}


def _scores(paths: list[Path]) -> dict[str, list[float]]:
    metrics = [json.loads(path.read_text()) for path in paths]
    return {"nds": [entry["nds"] for entry in metrics], "map": [entry["map"] for entry in metrics]}


@entry_point
def main() -> None:
    """Run the cells that have no metrics yet and collect all of them."""
    parser = argparse.ArgumentParser(prog="python -m train.ablation", description=main.__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/ablation"), help="folder of the cells (default: %(default)s)")
    parser.add_argument("--rows", nargs="*", default=[], help="only these rows (default: all)")
    parser.add_argument("--stress", default="w3a3", help="width at which calibration alone loses much (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of rows that train, at the stress width (default: %(default)s)")
    args = parser.parse_args()
    artifact.load_checkpoint(args.teacher, "teacher")
    float_metrics = args.run / "float" / "metrics.json"
    if not float_metrics.is_file():
        command = [sys.executable, "-m", "eval.run", "--model", str(args.teacher), "--out", str(float_metrics.parent)]
        subprocess.run(command, check=True)
    todo = [cell for cell in cells(args.run, args.stress, args.rows, args.seeds) if not cell.metrics.is_file()]
    for cell in tqdm(todo, desc="ablation", unit="cell"):
        tqdm.write(f"{cell.row.name} {cell.width} seed {cell.seed}")
        run_cell(cell, args.teacher)
        with artifact.atomic(args.run / "ablation.json") as temporary:
            temporary.write_text(json.dumps(collect(args.run, float_metrics, args.stress), indent=1) + "\n")
    sys.stdout.write(f"{args.run / 'ablation.json'}\n")


if __name__ == "__main__":
    main()
