"""Scores a model on a split with the official nuScenes metric, and writes results_nusc.json and metrics.json."""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from tqdm import tqdm

from eval import nds, submission
from eval.loop import evaluate_frames
from eval.open_model import OpenModel, SealedModel
from eval.submission import Record
from qdbev import artifact
from qdbev.config import Config
from qdbev.data.dataset import FrameDataset
from qdbev.facts import MetricsFacts, PredictionsFacts
from qdbev.frames import open_frames

RESULTS, METRICS = "results_nusc.json", "metrics.json"
"""Names of the files with the official submission and with the scores."""


def evaluate(path: Path, model: SealedModel, config: Config, split: str, out: Path) -> dict[str, Any]:
    """Run a model over a split, score it, and write the files into the folder `out`, which changes only when everything is done.

    `config` is the model's config with the dataset to use. Returns the content of metrics.json.

    Raises:
        DatasetError: The dataset or the split is missing or incomplete.
        EvaluationError: The devkit cannot score the split.
    """
    dataset, data = open_frames(config, split), config.data
    results, seconds = predict(model, dataset)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        scratch = Path(name)
        submission.write(scratch / RESULTS, results)
        predictions = artifact.seal(scratch / RESULTS, config=model.seal.config, parent=model.seal, facts=PredictionsFacts(split=split))
        started = time.perf_counter()
        metrics = nds.evaluate(Path(data.root), data.version, split, scratch / RESULTS)
        seconds["metric"] = time.perf_counter() - started
        content = {
            **dataclasses.asdict(metrics),
            "model": path.name,
            "sha256": model.seal.sha256,
            "parent_sha256": model.seal.parent,
            "kind": model.seal.kind,
            "runtime": model.runtime,
            "bytes": path.stat().st_size,
            "data": {"version": data.version, "split": split},
            "frames": len(dataset),
            "boxes": sum(map(len, results.values())),
            "seconds": seconds,
            "predictions_sha256": predictions.sha256,
        }
        (scratch / METRICS).write_text(json.dumps(content, indent=1, allow_nan=False))
        facts = MetricsFacts(nds=metrics.nds, map=metrics.map)
        artifact.seal(scratch / METRICS, config=model.seal.config, parent=model.seal, facts=facts)
        _move(scratch, out)
    return content


def predict(model: OpenModel, dataset: FrameDataset) -> tuple[dict[str, list[Record]], dict[str, float]]:
    """Run a model over a dataset.

    Returns the submission records of every sample by its token, and seconds per frame: `model` is the median of the model alone, `frame`
    the mean including reading and decoding.
    """
    results: dict[str, list[Record]] = {}
    model_seconds = []
    started = time.perf_counter()
    for step in tqdm(evaluate_frames(model, dataset), desc="evaluating", total=len(dataset), unit="frame", disable=None):
        info = dataset.info(step.index)
        results[step.frame.token] = submission.records(step.frame.token, step.detections, info.ego_from_lidar, info.global_from_ego)
        model_seconds.append(step.model_seconds)
    frame_seconds = (time.perf_counter() - started) / len(dataset)
    if not any(results.values()):
        first = dataset.info(0)
        results[first.token] = [submission.placeholder(first.token, first.global_from_ego)]
    return results, {"model": statistics.median(model_seconds), "frame": frame_seconds}


def table(content: dict[str, Any]) -> Table:
    """A table for the terminal with the metrics of one model: a row of means, then a row for each class."""
    figures = [Column(title, justify="right") for title in ("NDS", "AP", "ATE", "ASE", "AOE", "AVE", "AAE")]
    title = f"{content['model']}: {content['frames']} frames of {content['data']['split']}"
    grid = Table("class", *figures, title=title, title_justify="left")
    grid.add_row("all", *(_three(content[name]) for name in nds.MEANS), style="bold", end_section=True)
    for name, ap in content["class_ap"].items():
        errors = content["class_tp"][name].values()
        grid.add_row(name, "", *map(_three, (ap, *errors)), style="dim" if name in content["absent"] else "")
    return grid


def warnings(metrics: dict[str, Any]) -> list[str]:
    """Warnings about the metrics for their reader, one sentence each."""
    found, data = [], metrics["data"]
    if metrics["absent"]:
        found.append(
            f"the ground truth of this split has no scored {', '.join(metrics['absent'])}: the metric counts each as AP 0 with errors "
            "of 1, so NDS and mAP can only be compared with runs on the same split"
        )
    if data["version"].endswith("mini"):
        found.append(
            f"{data['version']} is for smoke runs: {data['split']} is {metrics['frames']} frames of a few scenes, so NDS and mAP say "
            "nothing about the model and cannot be compared with published numbers"
        )
    return found


def _move(scratch: Path, out: Path) -> None:
    """Move the finished files into the folder `out`, the metrics last, so that metrics never exist without their results."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, METRICS):
        for file in (artifact.seal_path(scratch / name), scratch / name):
            file.replace(out / file.name)


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
