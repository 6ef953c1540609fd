"""Trains and evaluates the rows of the method's ablation: `python -m bench.ablation --teacher runs/demo/teacher.pt`.

A cell is one row at one bit width with one seed. It is skipped if its metrics exist. The rows are those of QD-BEV's Tables 1 and 3 and
Figures 3 and 5 (arXiv:2308.10515), and our own for comparison; all rows that train have the same number of epochs. Progressive rows of one
width and seed share the stages before the last, so they start from the same student. Results: `rows.<row>.<width>.nds` and `.map` are lists
over the seeds; `curves.<row>` are the scores during the training with the first seed.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qdbev import artifact
from qdbev.command import entry_point
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.recipes import POLICY, progressive
from qdbev.quant.config import Stage

RATE, FINE_RATE = 1e-3, 3e-4
"""Learning rate of training, and that at W4A6, where calibration alone loses little; docs/distillation.md says how they were found."""
BEFORE = (0.15, 0.075, 0.15, 0.075)
"""Epochs of the progressive stages."""
LAST = 0.3
"""Epochs of the last stage."""
EPOCHS = sum(BEFORE) + LAST
LONGER = 3 * EPOCHS
"""Epochs of the rows that show the effect of longer training."""
KEEP_EVERY = LAST / 4
SEARCH_SEED = 100
"""Seed of the search for weights and temperatures; no row of the results uses it."""


class AblationError(ValueError):
    """A cell that cannot be run."""


@dataclass(frozen=True)
class AblationRow:
    """One row: stages and settings of `train.qat`, and the row of STARTS whose student it starts from, if any."""

    name: str
    stages: tuple[Stage, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    mixed: bool = False
    start: str | None = None
    curve: bool = False
    longer: bool = False
    """True for a row that trains for LONGER epochs, at the stress width, with one seed."""

    @property
    def trains(self) -> bool:
        """True for a row that trains and therefore runs with several seeds."""
        return bool(self.stages)


def _calibrated(name: str, **settings: Any) -> AblationRow:
    return AblationRow(name, settings=_quant(**settings))


def _distilling(name: str, form: str, **settings: float) -> AblationRow:
    """A row as in the paper: only the last stage distills."""
    return AblationRow(name, (Stage(epochs=LAST, distill=True),), _distill(form=form, **settings), start="progressive", curve=True)


def _distilling_throughout(name: str, form: str, **settings: float) -> AblationRow:
    """A row of one stage, in which everything is quantized and distills from the first step."""
    return AblationRow(name, (Stage(epochs=EPOCHS, distill=True),), _distill(form=form, **settings), curve=True)


def _longer(row: AblationRow) -> AblationRow:
    """A copy of a row of one stage that trains for LONGER epochs."""
    stages = tuple(dataclasses.replace(stage, epochs=LONGER) for stage in row.stages)
    return dataclasses.replace(row, name=f"{row.name}_longer", stages=stages, curve=False, longer=True)


def _quant(**settings: Any) -> dict[str, Any]:
    return {f"quant.{name}": value for name, value in settings.items()}


def _distill(**settings: float | str) -> dict[str, Any]:
    return {f"quant.distill.{name}": value for name, value in settings.items()}


def _alone(*groups: str) -> list[str]:
    """Patterns of float layers such that only `groups` are quantized."""
    return [*POLICY.float_layers, *(f"{group}.*" for group in BEVFormerConfig.groups if group not in groups)]


MODULES = {"backbone": ("backbone",), "neck": ("neck",), "encoder": ("encoder",), "decoder": ("decoder", "head")}
"""Groups of the four parts of the paper's Table 1, where the decoder includes the head."""

_PROGRESSIVE = progressive(BEFORE, RATE)
_STANDARD, _LAST = (Stage(epochs=EPOCHS),), (Stage(epochs=LAST),)
_FIXED = _quant(range_mode="fixed")
STARTS = {
    "progressive": AblationRow("progressive", _PROGRESSIVE, curve=True),
    "progressive_fixed": AblationRow("progressive_fixed", _PROGRESSIVE, _FIXED),
}
"""Rows whose students other rows start from, by name."""

_QAT = AblationRow("qat", _STANDARD, curve=True)
_BEST = _distilling_throughout("vgd_best", "guided", weight=2.0, head=1.0)
ROWS = (
    AblationRow("float_more", (Stage(groups=(), epochs=EPOCHS),)),
    _calibrated("ptq_max_tensor", calibration="max", per_channel=False),
    _calibrated("ptq_max", calibration="max"),
    _calibrated("ptq_mse"),
    *(_calibrated(f"ptq_{name}", float_layers=_alone(*groups)) for name, groups in MODULES.items()),
    AblationRow("ptq_mixed", mixed=True),
    AblationRow("qat_fixed", _STANDARD, _FIXED),
    AblationRow("qat_fixed_progressive", _LAST, _FIXED, start="progressive_fixed"),
    _QAT,
    AblationRow("qat_progressive", _LAST, start="progressive", curve=True),
    _distilling("distill_image", "image", weight=4.0, temperature=4.0),
    _distilling("distill_bev", "bev", weight=4.0, temperature=4.0),
    _distilling("vgd", "product", weight=4.0, temperature=1.0),
    _BEST,
    AblationRow("mixed", _STANDARD, mixed=True),
    _longer(_QAT),
    _longer(_BEST),
)

SEARCH = (
    *(
        _distilling(f"{name}_w{weight:g}_t{temperature:g}", form, weight=weight, temperature=temperature)
        for name, form in (("distill_image", "image"), ("distill_bev", "bev"), ("vgd", "product"))
        for weight, temperature in ((1.0, 1.0), (4.0, 1.0), (4.0, 4.0))
    ),
    _distilling_throughout("whole_guided_w2_h1", "guided", weight=2.0, head=1.0),
    _distilling_throughout("whole_guided_w2_h4", "guided", weight=2.0, head=4.0),
    _distilling_throughout("whole_bev_w2_h1", "bev", weight=2.0, head=1.0),
)
"""Rows of the search for the weight and temperature of each form of distillation, three trainings for each form."""


@dataclass(frozen=True)
class Cell:
    """One row at one bit width with one seed, in the folder `run`."""

    row: AblationRow
    width: str
    seed: int
    run: Path
    curve: bool = False
    """Keep students during training and evaluate them."""

    @property
    def folder(self) -> Path:
        """Folder of this cell."""
        return self.run / self.row.name / self.width / f"seed{self.seed}"

    @property
    def stages(self) -> list[Stage]:
        """The row's stages with the learning rate of the width."""
        rate = FINE_RATE if self.width == "w4a6" else RATE
        return [dataclasses.replace(stage, learning_rate=rate) for stage in self.row.stages]

    @property
    def student(self) -> Path:
        """Path of the student's checkpoint."""
        return self.folder / "student.pt"

    @property
    def metrics(self) -> Path:
        """Path of the metrics; if the file exists, the cell is finished."""
        return self.folder / "eval" / "metrics.json"

    @property
    def start(self) -> "Cell | None":
        """The cell whose student this one starts from."""
        return None if self.row.start is None else dataclasses.replace(self, row=STARTS[self.row.start])


def cells(run: Path, stress: str, names: list[str], seeds: int) -> Iterator[Cell]:
    """Yield the cells of the rows `names`, or of all. Rows that train have `seeds` seeds, except longer rows and W4A6; all others have one.

    Raises:
        AblationError: A row does not exist.
    """
    unknown = sorted(set(names) - {row.name for row in ROWS})
    if unknown:
        raise AblationError(f"no rows {', '.join(unknown)}; there are {', '.join(row.name for row in ROWS)}")
    for row in (row for row in ROWS if not names or row.name in names):
        for width in _widths(row, stress):
            for seed in range(seeds if row.trains and not row.longer and width in (stress, "w8a8") else 1):
                yield Cell(row, width, seed, run, curve=row.curve and width == stress and seed == 0)


def _widths(row: AblationRow, stress: str) -> list[str]:
    """Bit widths at which a row is measured."""
    if row.name == "float_more":
        return ["w8a8"]
    if row.longer:
        return [stress]
    return ["w8a8", "w4a6", stress] if row.name == "ptq_mse" else ["w4a6", stress]


def search_cells(run: Path, stress: str) -> list[Cell]:
    """One cell for each row of SEARCH."""
    return [Cell(row, stress, SEARCH_SEED, run) for row in SEARCH]


def widths_file(cell: Cell) -> Path:
    """Path of the bit widths of single layers, which all mixed rows at the cell's width share."""
    return cell.run / f"widths_{cell.width}.json"


def commands(cell: Cell, teacher: Path) -> list[list[str]]:
    """The commands that are still needed for the cell's metrics, in order. The student that it starts from must exist."""
    train = [] if cell.student.is_file() else [_train(cell, teacher)]
    return [*train, ["eval.run", "--model", str(cell.student), "--out", str(cell.metrics.parent)]]


def curve_commands(cell: Cell) -> list[list[str]]:
    """The commands that evaluate the students kept during training which have no metrics yet."""
    kept = [student for part in (cell.start, cell) if part is not None for student in part.folder.glob("student.stage*.step*.pt")]
    return [
        ["eval.run", "--model", str(student), "--out", str(student.with_suffix(""))]
        for student in sorted(kept)
        if not (student.with_suffix("") / "metrics.json").is_file()
    ]


def _train(cell: Cell, teacher: Path) -> list[str]:
    values = {"quant.stages": [dataclasses.asdict(stage) for stage in cell.stages], **cell.row.settings, "seed": cell.seed}
    sets = [part for name, value in values.items() for part in ("--set", f"{name}={value if isinstance(value, str) else repr(value)}")]
    widths = ["--widths", str(widths_file(cell))] if cell.row.mixed else []
    start = [] if cell.start is None else ["--start", str(cell.start.student)]
    keep = ["--keep-every", str(KEEP_EVERY)] if cell.curve and cell.row.curve else []
    resume = ["--resume"] if any(cell.folder.glob("*.state.pt")) else []
    common = ["train.qat", "--teacher", str(teacher), "--bits", cell.width, "--student", str(cell.student)]
    return [*common, *widths, *start, *keep, *resume, *sets]


def run_cell(cell: Cell, teacher: Path, threads: int) -> None:
    """Train and evaluate a cell, with output to the log in its folder. Raises AblationError if a command fails."""
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
    with log.open("a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise AblationError(f"python -m {command[0]} failed; see {log}")


def run_all(todo: list[Cell], teacher: Path, jobs: int, done: Callable[[Cell], None]) -> None:
    """Run cells, `jobs` at a time, and call `done` after each; shared students and widths are made first.

    Raises:
        AblationError: A cell fails; the others are finished first.
    """
    threads = max((os.cpu_count() or 1) // jobs, 1)
    starts = {cell.start.folder: cell.start for cell in todo if cell.start is not None and not cell.start.student.is_file()}
    mixed = {widths_file(cell): cell for cell in todo if cell.row.mixed and not widths_file(cell).is_file()}

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
    """Choose the bit widths for mixed rows; only the first cell's command measures, the others use its measurements."""
    for cell in mixed:
        measured = [] if cell is mixed[0] else ["--measured", str(widths_file(mixed[0]))]
        command = ["train.sensitivity", "--teacher", str(teacher), "--bits", cell.width, "--budget", "size", *measured]
        _execute([*command, "--out", str(widths_file(cell))], cell.run / "log.txt", threads)


def collect(run: Path, teacher_metrics: Path, stress: str) -> dict[str, Any]:
    """All results so far, in the form of results/ablation_micro.json; float rows have no width and are repeated under each."""
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
    curves = {cell.row.name: _curve(cell) for cell in cells(run, stress, [], 1) if cell.curve and _curve(cell)}
    search = {cell.row.name: _scores([cell.metrics]) for cell in search_cells(run, stress) if cell.metrics.is_file()}
    seconds = sum(json.loads(path.read_text()) for path in run.glob("*/*/*/seconds.json"))
    about = {
        "stress": stress,
        "epochs": EPOCHS,
        "stages": [*BEFORE, LAST],
        "learning_rates": {"w4a6": FINE_RATE, "other": RATE},
        "seconds": seconds,
        "cpu_cores": os.cpu_count(),
    }
    return {**about, "rows": rows, "curves": curves, "search": search, "made": artifact.provenance()}


def _scores(paths: list[Path]) -> dict[str, list[float]]:
    metrics = [json.loads(path.read_text()) for path in paths]
    return {"nds": [entry["nds"] for entry in metrics], "map": [entry["map"] for entry in metrics]}


def _curve(cell: Cell) -> list[dict[str, float]]:
    """Scores of the students that were kept during a cell's training, in its order, beginning with the calibrated student."""
    points = []
    for part in (cell.start, cell):
        for path in part.folder.glob("student.stage*.step*/metrics.json") if part is not None else ():
            facts = artifact.load_checkpoint(path.parent.with_name(path.parent.name + ".pt"), "student")[0].facts
            metrics = json.loads(path.read_text())
            points.append(
                {
                    "stage": facts.stage + len(BEFORE) * (part is cell and cell.start is not None),
                    "epochs": facts.epochs,
                    "nds": metrics["nds"],
                    "map": metrics["map"],
                }
            )
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
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds of rows that train, at the stress width (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, among which the cores are shared (default: %(default)s)")
    args = parser.parse_args(argv)
    artifact.load_checkpoint(args.teacher, "teacher")
    chosen = search_cells(args.run, args.stress) if args.search else list(cells(args.run, args.stress, args.rows, args.seeds))
    float_metrics = args.run / "float" / "metrics.json"
    if not float_metrics.is_file():
        _execute(["eval.run", "--model", str(args.teacher), "--out", str(float_metrics.parent)], args.run / "log.txt", os.cpu_count() or 1)
    todo = [cell for cell in chosen if not cell.metrics.is_file() or (cell.curve and curve_commands(cell))]
    lock = threading.Lock()
    with tqdm(total=len(todo), desc="ablation", unit="cell") as bar:

        def done(cell: Cell) -> None:
            with lock, artifact.atomic(args.run / "ablation.json") as temporary:
                temporary.write_text(json.dumps(collect(args.run, float_metrics, args.stress), indent=1) + "\n")
                bar.set_postfix_str(f"{cell.row.name} {cell.width} seed {cell.seed}")
                bar.update()

        run_all(todo, args.teacher, args.jobs, done)
    sys.stdout.write(f"{args.run / 'ablation.json'}\n")


if __name__ == "__main__":
    main()
