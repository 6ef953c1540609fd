"""An engine, its ONNX and its checkpoint side by side: the official metric of each, and the first tensor in which they part.

    python -m eval.engine_eval --model runs/demo/w4a6.engine

Takes the files that the model was made of from beside it (`.engine` <- `.onnx` <- `.pt`); for a `.onnx`, only the checkpoint. Scores are
those of eval.run, each model with its own history, and lie where it puts them. Tensors are compared with those of the file it was made
of, on the same inputs, that file's history among them: what differs is then of this frame, and what accumulates shows in the metric.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from eval import run
from eval.detectors import Detector, Infer, open_detector
from eval.loop import Frames, steps
from eval.nds import EvaluationError
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.config import DataConfig
from qdbev.data.dataset import FrameDataset
from qdbev.schema import Frame

TOLERANCE = 0.999
"""Cosine below which a tensor counts as different."""
_DISTANCE = math.sqrt(2 * (1 - TOLERANCE))
"""Length of the difference over that of the reference at which two tensors of one length have that cosine: a wrong scale, which the
cosine does not see, counts as well."""
_TENSORS = ("bev", "cls_logits", "box_code")
"""In the order in which the network makes them."""
_COMPARED_FRAMES = 40
"""A scene of nuScenes."""
_STAGES = (".pt", ".onnx", ".engine")
_METRICS = ("nds", "map", "mate", "mase", "maoe", "mave", "maae")
_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One tensor of one frame of `model` against `reference`, the file it was made of."""

    model: str
    reference: str
    frame: int
    token: str
    tensor: str
    cosine: float
    distance: float
    max_abs: float

    @property
    def passed(self) -> bool:
        """Whether the tensors count as the same."""
        return self.cosine >= TOLERANCE and self.distance <= _DISTANCE


class _First:
    """The first frames of a dataset."""

    def __init__(self, dataset: Frames, count: int) -> None:
        self._dataset = dataset
        self._count = count

    def __len__(self) -> int:
        return min(len(self._dataset), self._count)

    def frame(self, index: int) -> Frame:
        return self._dataset.frame(index)


def family(model: Path) -> list[Path]:
    """`model` and the files that it was made of, beside it, the checkpoint first.

    Raises:
        EvaluationError: The suffix is unknown, or one of the files is missing.
    """
    if model.suffix not in _STAGES[1:]:
        raise EvaluationError(f"{model} ends in {model.suffix or 'nothing'!r}; give an .engine, or an .onnx")
    paths = [model.with_suffix(suffix) for suffix in _STAGES[: _STAGES.index(model.suffix) + 1]]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise EvaluationError(f"{', '.join(missing)} not found; {model} is compared with the files it was made of: bring them beside it")
    return paths


def compare(models: Sequence[tuple[str, Detector]], dataset: Frames) -> Iterator[Row]:
    """Rows of the first frames: each model against the one before it, on that one's inputs.

    Raises:
        EvaluationError: A model gives NaN.
    """
    for (reference, source), (name, detector) in pairwise(models):
        seen: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
        both = Detector(source.seal, source.config, _both(source, detector, seen))
        for step in steps(both, _First(dataset, _COMPARED_FRAMES)):
            wanted, found = seen.pop()
            for tensor in _TENSORS:
                _require_finite({reference: wanted[tensor], name: found[tensor]}, tensor, step.index)
                yield Row(name, reference, step.index, step.frame.token, tensor, *figures(wanted[tensor], found[tensor]))


def figures(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float, float]:
    """Cosine, length of the difference over that of `wanted`, and largest difference. Arrays of zeros agree with each other only."""
    a, b = wanted.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    apart, largest = float(np.linalg.norm(a - b)), float(np.abs(a - b).max())
    if 0.0 in lengths:
        return (1.0, 0.0, 0.0) if lengths == (0.0, 0.0) else (0.0, 1.0, largest)
    return float(a @ b) / (lengths[0] * lengths[1]), apart / lengths[0], largest


def evaluate(paths: Sequence[Path], data: DataConfig, split: str, out: Path, device: str | None) -> dict[str, Any]:
    """Compare and score models made of each other, the checkpoint first; metrics go into a folder of `out` each.

    Returns:
        `models` (the metrics of each), `rows` (of `compare`), `first_difference` (the first row out of tolerance, or None).

    Raises:
        ArtifactError: A file was not made from the one before it.
        ValueError: A model cannot be opened here, or the split cannot be scored.
    """
    with ExitStack() as stack:
        models = [(path.name, stack.enter_context(open_detector(path, device if path.suffix == ".pt" else None))) for path in paths]
        for (parent, (_, source)), (child, (_, detector)) in pairwise(zip(paths, models, strict=True)):
            artifact.expect_parent(child, detector.seal, parent, source.seal)
        config = models[0][1].config
        dataset = FrameDataset(data, config.model.pc_range, split, training=False, seed=config.seed)
        rows = list(compare(models, dataset))
        scores = [
            run.evaluate(path, detector, data, split, out / path.name.replace(".", "_"))
            for path, (_, detector) in zip(paths, models, strict=True)
        ]
    return {
        "models": {score["model"]: {name: score[name] for name in (*_METRICS, "frames", "class_ap")} for score in scores},
        "data": {"version": data.version, "split": split},
        "compared_frames": min(len(dataset), _COMPARED_FRAMES),
        "tolerance": TOLERANCE,
        "first_difference": next((row._asdict() for row in rows if not row.passed), None),
        "rows": [row._asdict() for row in rows],
        "made": artifact.provenance(),
    }


def score_table(content: dict[str, Any]) -> Table:
    """A row per metric, a column per model."""
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column("")
    for name in content["models"]:
        grid.add_column(name, justify="right")
    for metric in _METRICS:
        grid.add_row(metric, *(f"{scores[metric]:.4f}" for scores in content["models"].values()))
    return grid


def tensor_table(content: dict[str, Any]) -> Table:
    """The worst frame of each tensor of each pair."""
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("model", "against", "tensor", "lowest cosine", "in frame", "distance", "max abs"):
        grid.add_column(title, justify="left" if title in ("model", "against", "tensor") else "right")
    rows = [Row(**row) for row in content["rows"]]
    for pair in dict.fromkeys((row.model, row.reference, row.tensor) for row in rows):
        mine = [row for row in rows if (row.model, row.reference, row.tensor) == pair]
        worst = min(mine, key=lambda row: row.cosine)
        largest = max(row.distance for row in mine), max(row.max_abs for row in mine)
        grid.add_row(*pair, f"{worst.cosine:.6f}", str(worst.frame), f"{largest[0]:.4f}", f"{largest[1]:.2e}")
    return grid


def require_same(content: dict[str, Any]) -> None:
    """Raise EvaluationError, naming the first tensor out of tolerance, if there is one."""
    first = content["first_difference"]
    if first is not None:
        row = Row(**first)
        raise EvaluationError(
            f"{row.model} does not compute what {row.reference} computes: first in {row.tensor} of frame {row.frame} ({row.token}), cosine "
            f"{row.cosine:.6f} (at least {TOLERANCE}), distance {row.distance:.4f} (at most {_DISTANCE:.4f}), max abs {row.max_abs:.2e}"
        )


def _both(source: Detector, detector: Detector, seen: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]) -> Infer:
    """Both on the same inputs; the first one's outputs go on."""

    def infer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append((source(inputs), detector(inputs)))
        return seen[-1][0]

    return infer


def _require_finite(outputs: dict[str, np.ndarray], tensor: str, frame: int) -> None:
    for model, value in outputs.items():
        wrong = int(value.size - np.isfinite(value).sum())
        if wrong:
            raise EvaluationError(f"{model}: {wrong} of {value.size} values of {tensor} in frame {frame} are NaN or infinite")


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.engine_eval", description="Score and compare an engine, its ONNX and checkpoint.")
    parser.add_argument("--model", type=Path, required=True, help=".engine or .onnx file; what it was made of lies beside it")
    parser.add_argument("--data", help="dataset folder (default: the one in the model's config)")
    parser.add_argument("--version", help="version of the dataset, as v1.0-mini (default: the one in the model's config)")
    parser.add_argument("--split", help="val, mini_val, ... or one of splits.json (default: the model's data.val_split)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: eval beside the model)")
    parser.add_argument("--device", help="where the .pt runs: cpu, cuda (default: cpu)")
    return parser.parse_args()


@entry_point
def main() -> None:
    """Model in, scores and comparison out; fails if a tensor is out of tolerance."""
    args = parse_args()
    paths, out = family(args.model), args.out or args.model.parent / "eval"
    with open_detector(paths[0], args.device) as detector:
        data, split = run.data_of(detector.config.data, args)
    content = evaluate(paths, data, split, out, args.device)
    path = out / f"{args.model.name.replace('.', '_')}_compared.json"
    with artifact.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
    for grid in (score_table(content), tensor_table(content)):
        Console().print(grid)
    _log.info("%s", path)
    require_same(content)


if __name__ == "__main__":
    main()
