"""Trains and evaluates every row of the method's ablation: `python -m bench.ablation --teacher runs/demo/teacher.pt`.

A cell is one row (bench/ablation_rows.py) at one width with one seed. It runs a few commands, the last of which is `eval.run`; a cell whose
metrics already exist is skipped. Progressive rows of one width and seed continue from the same student.

The result is ablation.json: `rows.<row>.<width>.nds` and `.map` are lists over the seeds, `curves.<row>` the scores during the training of
the first seed.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import report
from bench.ablation_rows import BEFORE, EPOCHS, FINE_RATE, LAST, RATE, ROWS, SEARCH, STARTS, AblationRow
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.quant.config import Stage

KEEP_EVERY = LAST / 4
"""Epochs between two students that are kept for a curve."""
SEARCH_SEED = 100
"""Seed of the search for weights and temperatures; no row is evaluated with it."""
_COMMAND_LIMIT_S = 24 * 3600.0
"""Seconds that one command of a cell may take; the longest trainings take hours."""


class AblationError(ValueError):
    """A row that does not exist, or a cell whose commands fail."""


@dataclass(frozen=True)
class Cell:
    """One row at one width with one seed."""

    row: AblationRow
    width: str
    """Bits of weights and activations, such as w4a6."""
    seed: int
    run: Path
    """Folder of the whole ablation."""
    curve: bool = False
    """Keep students during the training and evaluate them."""

    @property
    def folder(self) -> Path:
        """Folder of this cell's files."""
        return self.run / self.row.name / self.width / f"seed{self.seed}"

    @property
    def stages(self) -> list[Stage]:
        """Stages of the row with the learning rate of the width."""
        rate = FINE_RATE if self.width == "w4a6" else RATE
        return [dataclasses.replace(stage, learning_rate=rate) for stage in self.row.stages]

    @property
    def student(self) -> Path:
        """Path of the trained checkpoint."""
        return self.folder / "student.pt"

    @property
    def widths(self) -> Path:
        """File with the widths of single layers, which all mixed rows of the cell's width share."""
        return self.run / f"widths_{self.width}.json"

    @property
    def metrics(self) -> Path:
        """Path of the metrics; the cell is done when they exist."""
        return self.folder / "eval" / "metrics.json"

    @property
    def start(self) -> "Cell | None":
        """The cell whose student this one continues from, if there is one."""
        return None if self.row.start is None else dataclasses.replace(self, row=STARTS[self.row.start])

    @property
    def kept(self) -> list[Path]:
        """Students that were kept during the training, that of the start included."""
        return [path for part in (self.start, self) if part is not None for path in sorted(part.folder.glob("student.stage*.step*.pt"))]


def cells(run: Path, stress: str, names: list[str], seeds: int) -> Iterator[Cell]:
    """All cells of the rows `names`, or of all rows if no name is given. Raises AblationError if a row does not exist.

    Rows that train get `seeds` seeds at the stress width, and one seed at W4A6 and in longer trainings. W8A8 is only calibrated.
    """
    unknown = sorted(set(names) - {row.name for row in ROWS})
    if unknown:
        raise AblationError(f"no rows {', '.join(unknown)}; there are {', '.join(row.name for row in ROWS)}")
    for row in (row for row in ROWS if not names or row.name in names):
        for width in _widths(row, stress):
            for seed in range(seeds if row.stages and not row.longer and width in (stress, "w8a8") else 1):
                yield Cell(row, width, seed, run, curve=row.curve and width == stress and seed == 0)


def _widths(row: AblationRow, stress: str) -> list[str]:
    """Widths at which a row is measured; a row that quantizes nothing is measured once."""
    if row.name == "float_more":
        return ["w8a8"]
    if row.longer:
        return [stress]
    return ["w8a8", "w4a6", stress] if row.name == "ptq_mse" else ["w4a6", stress]


def search_cells(run: Path, stress: str) -> list[Cell]:
    """One cell for each form, weight and temperature of the search."""
    return [Cell(row, stress, SEARCH_SEED, run) for row in SEARCH]


def commands(cell: Cell, teacher: Path) -> list[list[str]]:
    """Commands that train and evaluate a cell, in order, without those that are already done. The student of its start must exist."""
    train = [] if cell.student.is_file() else [_train(cell, teacher)]
    return [*train, ["eval.run", "--model", str(cell.student), "--out", str(cell.metrics.parent)]]


def curve_commands(cell: Cell) -> list[list[str]]:
    """Commands that evaluate the students that were kept during training and have no metrics yet."""
    folders = {student: student.with_suffix("") for student in cell.kept}
    todo = {student: folder for student, folder in folders.items() if not (folder / "metrics.json").is_file()}
    return [["eval.run", "--model", str(student), "--out", str(folder)] for student, folder in todo.items()]


def _train(cell: Cell, teacher: Path) -> list[str]:
    values = {"quant.stages": [dataclasses.asdict(stage) for stage in cell.stages], **cell.row.settings, "seed": cell.seed}
    sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    widths = ["--widths", str(cell.widths)] if cell.row.mixed else []
    start = [] if cell.start is None else ["--start", str(cell.start.student)]
    keep = ["--keep-every", str(KEEP_EVERY)] if cell.curve else []
    resume = ["--resume"] if any(cell.folder.glob("*.state.pt")) else []
    common = ["train.qat", "--teacher", str(teacher), "--bits", cell.width, "--student", str(cell.student)]
    return [*common, *widths, *start, *keep, *resume, *sets]


def run_cell(cell: Cell, teacher: Path, threads: int) -> None:
    """Train and evaluate a cell; the output of the commands goes to its log. Raises AblationError if a command fails."""
    _timed(cell, commands(cell, teacher), threads)
    for command in curve_commands(cell) if cell.curve else ():
        _execute(command, cell.folder / "log.txt", threads)


def _timed(cell: Cell, wanted: list[list[str]], threads: int) -> None:
    begin = time.monotonic()
    for command in wanted:
        _execute(command, cell.folder / "log.txt", threads)
    with artifact.atomic(cell.folder / "seconds.json") as temporary:
        temporary.write_text(json.dumps(round(time.monotonic() - begin, 1)))
    for state in cell.folder.glob("*.state.pt"):
        state.unlink()


def _execute(command: list[str], log: Path, threads: int) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    python, environment = [sys.executable, "-m", *command], {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        try:
            done = subprocess.run(python, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False, timeout=_COMMAND_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise AblationError(f"python -m {command[0]} took more than {_COMMAND_LIMIT_S / 3600:.0f} hours; see {log}") from error
    if done.returncode:
        raise AblationError(f"python -m {command[0]} failed; see {log}")


def run_all(todo: list[Cell], teacher: Path, jobs: int, done: Callable[[Cell], None]) -> None:
    """Run cells, `jobs` at a time, after the students and widths that they share; calls `done` after each. Raises AblationError."""
    threads = max((os.cpu_count() or 1) // jobs, 1)
    starts = {cell.start.folder: cell.start for cell in todo if cell.start is not None and not cell.start.student.is_file()}
    mixed = {cell.widths: cell for cell in todo if cell.row.mixed and not cell.widths.is_file()}

    def run_one(cell: Cell) -> None:
        run_cell(cell, teacher, threads)
        done(cell)

    with ThreadPoolExecutor(jobs) as pool:
        first = [pool.submit(_measure, list(mixed.values()), teacher, threads)]
        first += [pool.submit(_timed, start, [_train(start, teacher)], threads) for start in starts.values()]
        for future in first:
            future.result()
        for future in [pool.submit(run_one, cell) for cell in todo]:
            future.result()


def _measure(mixed: list[Cell], teacher: Path, threads: int) -> None:
    """Choose the widths of the layers for mixed rows; the sensitivity that the first cell measures serves all."""
    for cell in mixed:
        measured = [] if cell is mixed[0] else ["--measured", str(mixed[0].widths)]
        command = ["train.sensitivity", "--teacher", str(teacher), "--bits", cell.width, "--budget", "size", *measured]
        _execute([*command, "--out", str(cell.widths)], cell.run / "log.txt", threads)


def collect(run: Path, teacher_metrics: Path, stress: str) -> dict[str, Any]:
    """All scores so far, in the form of results/ablation_micro.json; the float model has no width and is listed under each width."""
    rows: dict[str, Any] = {}
    if teacher_metrics.is_file():
        rows["float"] = dict.fromkeys(("w8a8", "w4a6", "stress"), _scores([teacher_metrics]))
    for row in ROWS:
        for width, name in (("w8a8", "w8a8"), ("w4a6", "w4a6"), (stress, "stress")):
            found = sorted((run / row.name / width).glob("seed*/eval/metrics.json"))
            if found:
                rows.setdefault(row.name, {})[name] = _scores(found)
    if "float_more" in rows:
        rows["float_more"] = dict.fromkeys(("w8a8", "w4a6", "stress"), rows["float_more"]["w8a8"])
    curves = {cell.row.name: points for cell in cells(run, stress, [], 1) if cell.curve and (points := _curve(cell))}
    search = {cell.row.name: _scores([cell.metrics]) for cell in search_cells(run, stress) if cell.metrics.is_file()}
    seconds = sum(json.loads(path.read_text()) for path in run.glob("*/*/*/seconds.json"))
    return {
        "stress": stress,
        "epochs": EPOCHS,
        "stages": [*BEFORE, LAST],
        "learning_rates": {"w4a6": FINE_RATE, "other": RATE},
        "seconds": seconds,
        "cpu_cores": os.cpu_count(),
        "rows": rows,
        "curves": curves,
        "search": search,
    }


def _scores(paths: list[Path]) -> dict[str, list[float]]:
    metrics = [json.loads(path.read_text()) for path in paths]
    return {"nds": [entry["nds"] for entry in metrics], "map": [entry["map"] for entry in metrics]}


def _curve(cell: Cell) -> list[dict[str, float]]:
    """Scores of the students that were kept during a cell's training, in the order of training; the first one is only calibrated."""
    points = []
    for student in cell.kept:
        metrics = student.with_suffix("") / "metrics.json"
        if metrics.is_file():
            facts = artifact.load_checkpoint(student, "student")[0].facts
            stages_before = len(BEFORE) if cell.start is not None and student.parent == cell.folder else 0
            scores = json.loads(metrics.read_text())
            points.append({"stage": stages_before + facts.stage, "epochs": facts.epochs, "nds": scores["nds"], "map": scores["map"]})
    return sorted(points, key=lambda point: (point["stage"], point["epochs"]))


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Run the cells that have no metrics yet and collect all of them."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=main.__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/ablation"), help="folder of the cells (default: %(default)s)")
    parser.add_argument("--rows", nargs="*", default=[], help="only these rows (default: all)")
    parser.add_argument("--search", action="store_true", help="instead of the rows, try weights and temperatures of distillation")
    parser.add_argument("--stress", default="w3a3", help="width at which calibration alone loses much (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of rows that train, at the stress width (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, among which the cores are shared (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise AblationError(f"--jobs {args.jobs} must be at least 1")
    artifact.load_checkpoint(args.teacher, "teacher")
    chosen = search_cells(args.run, args.stress) if args.search else list(cells(args.run, args.stress, args.rows, args.seeds))
    float_metrics = args.run / "float" / "metrics.json"
    if not float_metrics.is_file():
        _execute(["eval.run", "--model", str(args.teacher), "--out", str(float_metrics.parent)], args.run / "log.txt", os.cpu_count() or 1)
    todo = [cell for cell in chosen if not cell.metrics.is_file() or (cell.curve and curve_commands(cell))]
    lock = threading.Lock()
    with tqdm(total=len(todo), desc="ablation", unit="cell") as bar:

        def done(cell: Cell) -> None:
            with lock:
                report.write(args.run / "ablation.json", collect(args.run, float_metrics, args.stress))
                bar.set_postfix_str(f"{cell.row.name} {cell.width} seed {cell.seed}")
                bar.update()

        run_all(todo, args.teacher, args.jobs, done)
    sys.stdout.write(f"{args.run / 'ablation.json'}\n")


if __name__ == "__main__":
    main()
