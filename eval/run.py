"""A model and a split in, the official metric out.

    python -m eval.run --model runs/demo/teacher.pt

Writes results_nusc.json (the official submission) and metrics.json, both sealed, into the folder of --out. The first is the input of any
other nuScenes tool.
"""

import argparse
import dataclasses
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from eval import nds, submission
from eval.loop import steps
from eval.open_model import Detector, open_detector
from eval.submission import Record
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.config import DataConfig
from qdbev.data.dataset import FrameDataset

RESULTS = "results_nusc.json"
METRICS = "metrics.json"
_log = logging.getLogger(__name__)


def evaluate(path: Path, detector: Detector, data: DataConfig, split: str, out: Path) -> dict[str, Any]:
    """Run the detector over a split, score it, and leave the files in `out`, which changes only when all is done.

    Returns:
        The content of metrics.json.

    Raises:
        DatasetError: The dataset or the split is missing or incomplete.
        EvaluationError: The devkit cannot score the split.
    """
    dataset = FrameDataset(data, detector.config.model.pc_range, split, training=False, seed=detector.config.seed)
    results, seconds = predict(detector, dataset)
    config = detector.seal.config
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        scratch = Path(name)
        submission.write(scratch / RESULTS, results)
        predictions = artifact.seal(scratch / RESULTS, kind="predictions", config=config, parent=detector.seal, facts={"split": split})
        started = time.perf_counter()
        metrics = nds.evaluate(Path(data.root), data.version, split, scratch / RESULTS)
        seconds["metric"] = time.perf_counter() - started
        content = {
            **metrics.to_dict(),
            **_about(path, detector),
            "data": {"version": data.version, "split": split},
            "frames": len(dataset),
            "boxes": sum(map(len, results.values())),
            "seconds": seconds,
            "predictions_sha256": predictions.sha256,
        }
        (scratch / METRICS).write_text(json.dumps(content, indent=1, allow_nan=False))
        facts = {"nds": metrics.nds, "map": metrics.map}
        artifact.seal(scratch / METRICS, kind="metrics", config=config, parent=detector.seal, facts=facts)
        _move(scratch, out)
    return content


def predict(detector: Detector, dataset: FrameDataset) -> tuple[dict[str, list[Record]], dict[str, float]]:
    """Records of every sample, and seconds a frame: `model` is the median of the model alone, `frame` the mean with data and decoding."""
    results: dict[str, list[Record]] = {}
    model_seconds = []
    started = time.perf_counter()
    for step in tqdm(steps(detector, dataset), desc="evaluating", total=len(dataset), unit="frame", disable=None):
        info = dataset.info(step.index)
        results[step.frame.token] = submission.records(step.frame.token, step.detections, info.ego_from_lidar, info.global_from_ego)
        model_seconds.append(step.model_seconds)
    frame_seconds = (time.perf_counter() - started) / len(dataset)
    if not any(results.values()):
        first = dataset.info(0)
        results[first.token] = [submission.placeholder(first.token, first.global_from_ego)]
    return results, {"model": statistics.median(model_seconds), "frame": frame_seconds}


def table(content: dict[str, Any]) -> Table:
    """The metrics of one model for the terminal: the means, then a row per class."""
    grid = Table(title=f"{content['model']}: {content['frames']} frames of {content['data']['split']}", title_justify="left")
    grid.add_column("class")
    for title in ("NDS", "AP", "ATE", "ASE", "AOE", "AVE", "AAE"):
        grid.add_column(title, justify="right")
    means = [content[name] for name in ("nds", "map", "mate", "mase", "maoe", "mave", "maae")]
    grid.add_row("all", *map(_three, means), style="bold", end_section=True)
    for name, ap in content["class_ap"].items():
        errors = content["class_tp"][name].values()
        grid.add_row(name, "", *map(_three, (ap, *errors)), style="dim" if name in content["absent"] else "")
    return grid


def warnings(metrics: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    found, data = [], metrics["data"]
    if metrics["absent"]:
        found.append(
            f"the ground truth of this split has no scored {', '.join(metrics['absent'])}: the metric counts each as AP 0 with errors "
            "of 1, so NDS and mAP compare only with runs on the same split"
        )
    if data["version"].endswith("mini"):
        found.append(
            f"{data['version']} is for smoke runs: {data['split']} is {metrics['frames']} frames of a few scenes, so NDS and mAP say "
            "nothing of the model and compare with no published number"
        )
    return found


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Score a model on nuScenes with the official metric.")
    parser.add_argument("--model", type=Path, required=True, help=".pt, .onnx or .engine file with its seal")
    parser.add_argument("--out", type=Path, help="folder for the results (default: eval/<model's name> beside the model)")
    add_data(parser)
    return parser.parse_args()


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options that say what a model is scored on, read with `data_of`, and where a checkpoint runs."""
    parser.add_argument("--data", help="dataset folder (default: the one in the model's config)")
    parser.add_argument("--version", help="version of the dataset, as v1.0-mini (default: the one in the model's config)")
    parser.add_argument("--split", help="val, mini_val, ... or one of splits.json (default: the model's data.val_split)")
    parser.add_argument("--device", help="where a .pt runs: cpu, cuda (default: cpu)")


def data_of(config: DataConfig, args: argparse.Namespace) -> tuple[DataConfig, str]:
    """The model's data settings with the command line's dataset, and the split."""
    data = dataclasses.replace(config, root=args.data or config.root, version=args.version or config.version)
    return data, args.split or config.val_split


@entry_point
def main() -> None:
    """Model in, results and metrics out."""
    args = parse_args()
    out = args.out or args.model.parent / "eval" / args.model.name.replace(".", "_")
    with open_detector(args.model, args.device) as detector:
        data, split = data_of(detector.config.data, args)
        content = evaluate(args.model, detector, data, split, out)
    Console().print(table(content))
    for warning in warnings(content):
        _log.warning("warning: %s", warning)
    model_ms, frame_ms = (1e3 * content["seconds"][name] for name in ("model", "frame"))
    _log.info("%.1f ms a frame in the model, %.1f ms in all; %s", model_ms, frame_ms, out / METRICS)


def _about(path: Path, detector: Detector) -> dict[str, Any]:
    """Which model it was. Weights that an ONNX file keeps beside itself count as its bytes."""
    files = [path, path.with_name(path.name + ".data")]
    return {
        "model": path.name,
        "sha256": detector.seal.sha256,
        "parent_sha256": detector.seal.parent,
        "kind": detector.seal.kind,
        "bytes": sum(file.stat().st_size for file in files if file.is_file()),
    }


def _move(scratch: Path, out: Path) -> None:
    """Move the finished files into `out`, the metrics last."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, METRICS):
        for file in (artifact.seal_path(scratch / name), scratch / name):
            file.replace(out / file.name)


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
