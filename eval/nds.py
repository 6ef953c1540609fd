"""Computes the official nuScenes detection metric (detection_cvpr_2019) with the unchanged devkit."""

import contextlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.data_classes import DetectionMetrics
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.splits import create_splits_scenes, get_scenes_of_split

from qdbev.schema import CLASSES

CONFIG = "detection_cvpr_2019"
"""Name of the devkit's settings: class ranges, distance thresholds and the weights of NDS."""
ERRORS = {"trans_err": "ate", "scale_err": "ase", "orient_err": "aoe", "vel_err": "ave", "attr_err": "aae"}
"""Name of each true positive error in the devkit, and its usual abbreviation. Units: metres, 1 - IoU, radians, metres per second,
1 - accuracy."""
MEANS = ("nds", "map", *(f"m{error}" for error in ERRORS.values()))
"""Names of the metrics that are means over the classes."""
_ENDINGS = {"train": "trainval", "val": "trainval", "train_detect": "trainval", "train_track": "trainval", "test": "test"} | dict.fromkeys(
    ("mini_train", "mini_val"), "mini"
)
"""For each official split, the ending that the name of a dataset version must have for the devkit to evaluate the split on it."""


class EvaluationError(ValueError):
    """Results, a split or a dataset that are missing or do not fit together."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The official metrics. NDS and AP are between 0 and 1; the units of the errors are those of `ERRORS`.

    Attributes:
        nds: nuScenes detection score.
        map: Mean of the classes' AP.
        class_ap: AP of each class, the mean over the distance thresholds.
        class_tp: Errors of each class (ate, ase, aoe, ave, aae); None for an error that a class does not have (orientation of a cone).
        absent: Classes without a scored box in the split's ground truth; the metric counts them with AP 0 and errors of 1.
    """

    nds: float
    map: float
    mate: float
    mase: float
    maoe: float
    mave: float
    maae: float
    class_ap: dict[str, float]
    class_tp: dict[str, dict[str, float | None]]
    absent: list[str]


def evaluate(root: Path, version: str, split: str, results: Path) -> Metrics:
    """Score a results file against the annotations of a split of the dataset in `root`.

    Raises:
        EvaluationError: Dataset, split or results are missing, or the results are for other samples.
    """
    tables = root / version
    if not (tables / "sample.json").is_file():
        raise EvaluationError(f"{tables} holds no nuScenes tables; make the synthetic world with `make data`, or give the right --data")
    if not results.is_file():
        raise EvaluationError(f"{results} does not exist; it should be a results file of `python -m eval.run`")
    _check_split(tables, version, split)
    nuscenes = NuScenes(version, str(root), verbose=False)
    _check_samples(nuscenes, split, results)
    # The devkit shows a progress bar on standard error even with verbose=False.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(io.StringIO()):
        official = DetectionEval(nuscenes, config_factory(CONFIG), str(results), split, scratch, verbose=False)
        metrics, _ = official.evaluate()
    scored = {box.detection_name for box in official.gt_boxes.all}
    return _translate(metrics, absent=[name for name in CLASSES if name not in scored])


def _check_split(tables: Path, version: str, split: str) -> None:
    own = tables / "splits.json"
    names = sorted(json.loads(own.read_text())) if own.is_file() else []
    official = [name for name, ending in _ENDINGS.items() if version.endswith(ending)]
    if split in names and split not in create_splits_scenes():
        return
    if split not in official:
        raise EvaluationError(f"{version} has no split {split!r}; it has {', '.join(official + names) or 'no official split'}")


def _check_samples(nuscenes: NuScenes, split: str, results: Path) -> None:
    scenes = set(get_scenes_of_split(split, nuscenes))
    tokens = {s["token"] for s in nuscenes.sample if nuscenes.get("scene", s["scene_token"])["name"] in scenes}
    if not tokens:
        raise EvaluationError(f"split {split!r} has no sample in {nuscenes.dataroot}; choose a split whose scenes are there")
    try:
        predicted = set(json.loads(results.read_text())["results"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EvaluationError(f"{results} is no nuScenes results file ({error!r}); make it again with `python -m eval.run`") from error
    if predicted != tokens:
        raise EvaluationError(
            f"{results} does not fit split {split!r}: {len(tokens - predicted)} of its {len(tokens)} samples are missing, "
            f"and {len(predicted - tokens)} samples are not in the split; run `python -m eval.run` with this split and dataset"
        )


def _translate(metrics: DetectionMetrics, absent: list[str]) -> Metrics:
    values = metrics.serialize()
    return Metrics(
        nds=float(values["nd_score"]),
        map=float(values["mean_ap"]),
        **{f"m{ours}": float(values["tp_errors"][theirs]) for theirs, ours in ERRORS.items()},
        class_ap={name: float(values["mean_dist_aps"][name]) for name in CLASSES},
        class_tp={name: {ours: _number(values["label_tp_errors"][name][theirs]) for theirs, ours in ERRORS.items()} for name in CLASSES},
        absent=absent,
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
