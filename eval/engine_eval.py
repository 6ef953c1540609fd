"""Compares an engine with its ONNX and its checkpoint: the official metric of each, and the first tensor that differs.

    python -m eval.engine_eval --model runs/demo/w4a6.engine

The files that the model was made from are expected beside it: for an `.engine` the `.onnx` and the `.pt`, for an `.onnx` the `.pt`. The
scores are those of eval.run, and are written to the same places. Tensors are compared with those of the file the model was made from, on
the same inputs and history. A difference between tensors therefore arises in that frame; what accumulates over frames shows in the metric.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from eval import comparison, evaluate
from eval.comparison import TOLERANCE, ComparisonError, TensorDifference, compare
from eval.loop import FramesInOrder
from eval.nds import MEANS, EvaluationError
from eval.open_model import open_model
from eval.options import chosen_data, model_parser
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.config import Config
from qdbev.frames import open_frames

NDS_TOLERANCE = 0.002
"""Largest allowed difference between the NDS of an engine and of its ONNX."""
_COMPARED_FRAMES = 40
"""Frames whose tensors are compared; a scene of nuScenes has 40 key frames."""
_STAGES = (".pt", ".onnx", ".engine")
"""Suffixes of the files, each made from the one before it."""
_log = logging.getLogger(__name__)


def family(model: Path) -> list[Path]:
    """Paths of the files that `model` was made from and of `model` itself, the checkpoint first.

    Raises:
        EvaluationError: The suffix of `model` is unknown, or one of the files is missing.
    """
    if model.suffix not in _STAGES[1:]:
        raise EvaluationError(f"{model} ends in {model.suffix or 'nothing'!r}; give an .engine or an .onnx file")
    onnx = _onnx_of(model) if model.suffix == ".engine" else model
    paths = list(dict.fromkeys((onnx.with_suffix(".pt"), onnx, model)))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise EvaluationError(f"{', '.join(missing)} not found; {model} is compared with the files it was made from: copy them beside it")
    return paths


def _onnx_of(engine: Path) -> Path:
    """Path of the ONNX file that an engine was built from, as its seal says; one of the engine's name where it does not."""
    if not engine.is_file():
        return engine.with_suffix(".onnx")
    build = artifact.unseal(engine, "engine").facts.build
    return engine.parent / build.onnx if build else engine.with_suffix(".onnx")


def score_and_compare(paths: Sequence[Path], config: Config, split: str, out: Path, device: str | None) -> dict[str, Any]:
    """Compare and score models, each made from the one before it, the checkpoint first.

    Args:
        config: The config of the checkpoint with the dataset to use.
        out: Folder in which a folder of metrics is written for each model.
        device: Device of the checkpoint, or None for the CPU.

    Returns:
        `models`: the metrics of each model. `rows`: the differences that `compare` found. `first_difference`: the first row out of
        tolerance, or None. The other entries describe the dataset and the run.

    Raises:
        ArtifactError: A file was not made from the one before it.
        ValueError: A model cannot be opened here, or the split cannot be scored.
    """
    with ExitStack() as stack:
        models = [(path.name, stack.enter_context(open_model(path, device if path.suffix == ".pt" else None))) for path in paths]
        for (parent, (_, source)), (child, (_, made)) in pairwise(zip(paths, models, strict=True)):
            artifact.expect_parent(child, made.seal, parent, source.seal)
        dataset = open_frames(config, split)
        rows = list(compare(models, FramesInOrder(dataset, _COMPARED_FRAMES)))
        scores = [
            evaluate.evaluate(path, model, config, split, out / path.name.replace(".", "_"))
            for path, (_, model) in zip(paths, models, strict=True)
        ]
    return {
        "models": {score["model"]: {name: score[name] for name in (*MEANS, "frames", "class_ap")} for score in scores},
        "data": {"version": config.data.version, "split": split},
        "compared_frames": min(len(dataset), _COMPARED_FRAMES),
        "tolerance": TOLERANCE,
        "first_difference": next((row._asdict() for row in rows if not row.passed), None),
        "rows": [row._asdict() for row in rows],
        "made": artifact.provenance(),
    }


def score_table(content: dict[str, Any]) -> Table:
    """A table for the terminal with a row for each metric and a column for each model."""
    grid = _grid("", *(Column(name, justify="right") for name in content["models"]))
    for metric in MEANS:
        grid.add_row(metric, *(f"{scores[metric]:.4f}" for scores in content["models"].values()))
    return grid


def tensor_table(content: dict[str, Any]) -> Table:
    """A table for the terminal with the worst frame of each tensor of each pair of models."""
    figures = [Column(title, justify="right") for title in ("lowest cosine", "in frame", "distance", "max abs")]
    grid = _grid("model", "against", "tensor", *figures)
    rows = [TensorDifference(**row) for row in content["rows"]]
    for pair in dict.fromkeys((row.model, row.reference, row.tensor) for row in rows):
        mine = [row for row in rows if (row.model, row.reference, row.tensor) == pair]
        worst = min(mine, key=lambda row: row.cosine)
        distance, max_abs = max(row.distance for row in mine), max(row.max_abs for row in mine)
        grid.add_row(*pair, f"{worst.cosine:.6f}", str(worst.frame), f"{distance:.4f}", f"{max_abs:.2e}")
    return grid


def require_same(content: dict[str, Any]) -> None:
    """Raise ComparisonError if a tensor or the score of an engine is out of tolerance; the message names the first such tensor."""
    comparison.require_same(TensorDifference(**row) for row in content["rows"])
    for (reference, wanted), (name, found) in pairwise(content["models"].items()):
        apart = abs(found["nds"] - wanted["nds"])
        if name.endswith(".engine") and apart > NDS_TOLERANCE:
            raise ComparisonError(
                f"{name} scores NDS {found['nds']:.4f}, {reference} {wanted['nds']:.4f}: {apart:.4f} apart (at most {NDS_TOLERANCE}), "
                "although every compared tensor is within its tolerance"
            )


def _grid(*columns: Column | str) -> Table:
    return Table(*columns, box=None, padding=(0, 2, 0, 0), pad_edge=False)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Score a model and compare it with the files it was made from; fails if a tensor or the score is out of tolerance."""
    files, out = ".engine or .onnx file, beside the files it was made from", "folder for the results (default: eval beside the model)"
    parser = model_parser("eval.engine_eval", "Score and compare an engine, its ONNX and checkpoint.", files, out)
    args = parser.parse_args(argv)
    paths, out = family(args.model), args.out or args.model.parent / "eval"
    artifact.require_folder(out)
    with open_model(paths[0], args.device) as model:
        config, split = chosen_data(model.config, args)
    content = score_and_compare(paths, config, split, out, args.device)
    path = out / f"{args.model.name.replace('.', '_')}_compared.json"
    with artifact.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
    for grid in (score_table(content), tensor_table(content)):
        Console().print(grid)
    _log.info("%s", path)
    require_same(content)


if __name__ == "__main__":
    main()
