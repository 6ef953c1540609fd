"""Submission records equal those of the official code and score as expected with the official metric."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from eval import nds, submission
from eval.nds import EvaluationError
from eval.submission import SubmissionError
from qdbev.data.dataset import FrameDataset
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.geometry import rigid
from qdbev.recipes import RECIPES
from qdbev.schema import CLASSES, Detections

VERSION = "v1.0-trainval"


def open_split(root: Path, split: str) -> FrameDataset:
    data = dataclasses.replace(RECIPES["micro"]().data, root=str(root))
    return FrameDataset(data, BEVFormerConfig().pc_range, split, training=False, seed=0)


def truth_records(dataset: FrameDataset) -> dict[str, list[submission.Record]]:
    """Return every annotated object as a detection with score one."""
    results = {}
    for index in range(len(dataset)):
        frame, info = dataset.frame(index), dataset.info(index)
        found = Detections(frame.boxes, np.ones(len(frame.labels)), frame.labels)
        results[frame.token] = submission.records(frame.token, found, info.ego_from_lidar, info.global_from_ego)
    return results


def pose(values: np.ndarray) -> np.ndarray:
    return rigid(Rotation.from_quat(values[3:], scalar_first=True).as_matrix(), values[:3])


def one_car(**changed: float) -> Detections:
    box = {"x": 0.0, "y": 10.0, "z": 0.0, "w": 2.0, "l": 4.0, "h": 1.5, "yaw": 0.3, "vx": 1.0, "vy": 0.0, **changed}
    return Detections(np.array([list(box.values())]), np.ones(1), np.array([0]))


def test_records_equal_those_of_the_official_code(golden_modules: dict[str, np.ndarray]) -> None:
    golden = {name.removeprefix("fmt_"): value for name, value in golden_modules.items() if name.startswith("fmt_")}
    boxes = golden["in_boxes_bottom"].astype(np.float64)
    boxes[:, 2] += boxes[:, 5] / 2
    found = Detections(boxes, golden["in_scores"], golden["in_labels"])
    records = submission.records("token", found, pose(golden["lidar2ego"]), pose(golden["ego2global"]))
    assert len(records) == 38  # of 40: two are beyond the range of their class
    column = {name: np.array([record[name] for record in records]) for name in records[0]}
    for ours, theirs in (("translation", "translation"), ("size", "size"), ("velocity", "velocity"), ("detection_score", "score")):
        np.testing.assert_allclose(column[ours], golden[theirs], rtol=0, atol=2e-6, err_msg=ours)  # the official code adds h / 2 in float32
    sign = np.sign(np.sum(column["rotation"] * golden["rotation"], axis=1, keepdims=True))  # q and -q are the same rotation
    np.testing.assert_allclose(column["rotation"] * sign, golden["rotation"], rtol=0, atol=5e-7)
    assert column["detection_name"].tolist() == golden["name"].tolist()
    assert column["attribute_name"].tolist() == golden["attr"].tolist()


def test_ground_truth_scores_one_with_the_official_metric(tiny_world: Path, tmp_path: Path) -> None:
    results = truth_records(open_split(tiny_world, "val"))
    submission.write(tmp_path / "results.json", results)
    metrics = nds.evaluate(tiny_world, VERSION, "val", tmp_path / "results.json")
    present = 1 - len(metrics.absent) / len(CLASSES)  # the metric counts a class without ground truth as AP 0
    assert metrics.map == pytest.approx(present, abs=1e-9)
    for name in CLASSES:
        if name not in metrics.absent:
            errors = {kind: value for kind, value in metrics.class_tp[name].items() if value is not None and kind != "aae"}
            assert max(errors.values()) < 1e-4, (name, errors)  # attributes are guessed by a rule, the rest is the truth in float32
    if not metrics.absent:
        assert metrics.nds == pytest.approx(1 - 0.1 * metrics.maae, abs=1e-4)


def test_a_class_without_ground_truth_is_named_and_counts_as_zero(tiny_world: Path, tmp_path: Path) -> None:
    root = tmp_path / "world"
    for folder in (VERSION, "maps"):
        shutil.copytree(tiny_world / folder, root / folder)
    tables = {name: json.loads((root / VERSION / f"{name}.json").read_text()) for name in ("category", "instance", "sample_annotation")}
    buses = {row["token"] for row in tables["category"] if "bus" in row["name"]}
    instances = {row["token"] for row in tables["instance"] if row["category_token"] in buses}
    for row in tables["sample_annotation"]:
        if row["instance_token"] in instances:
            row["num_lidar_pts"] = row["num_radar_pts"] = 0  # the devkit drops what no sensor measured
    (root / VERSION / "sample_annotation.json").write_text(json.dumps(tables["sample_annotation"]))
    submission.write(tmp_path / "results.json", truth_records(open_split(tiny_world, "val")))
    with_bus, without = (nds.evaluate(world, VERSION, "val", tmp_path / "results.json") for world in (tiny_world, root))
    assert set(without.absent) - set(with_bus.absent) == {"bus"}
    assert (with_bus.class_ap["bus"], without.class_ap["bus"]) == (pytest.approx(1), 0)


def test_a_submission_without_boxes_scores_zero(tiny_world: Path, tmp_path: Path) -> None:
    dataset = open_split(tiny_world, "val")
    results: dict[str, list[submission.Record]] = {dataset.info(index).token: [] for index in range(len(dataset))}
    first = dataset.info(0)
    results[first.token] = [submission.placeholder(first.token, first.global_from_ego)]
    submission.write(tmp_path / "results.json", results)
    metrics = nds.evaluate(tiny_world, VERSION, "val", tmp_path / "results.json")
    assert (metrics.nds, metrics.map) == (0.0, 0.0)
    away = np.array(results[first.token][0]["translation"]) - first.global_from_ego[:3, 3]
    assert np.linalg.norm(away[:2]) > max(submission.CLASS_RANGE.values())  # the devkit removes it


def test_the_range_is_measured_from_the_ego_vehicle_in_its_ground_plane() -> None:
    ego_from_lidar = rigid(np.eye(3), np.array([0.0, 1.0, 0.0]))
    kept = submission.records("token", one_car(y=48.9, z=9.0), ego_from_lidar, np.eye(4))
    lost = submission.records("token", one_car(y=49.1), ego_from_lidar, np.eye(4))
    assert (len(kept), len(lost)) == (1, 0)


@pytest.mark.parametrize(
    ("name", "speed", "expected"),
    [
        ("car", 0.2, "vehicle.parked"),
        ("car", 0.21, "vehicle.moving"),
        ("bus", 0.0, "vehicle.stopped"),
        ("pedestrian", 0.0, "pedestrian.standing"),
        ("bicycle", 3.0, "cycle.with_rider"),
        ("bicycle", 0.0, "cycle.without_rider"),
        ("traffic_cone", 5.0, ""),
    ],
)
def test_attribute_follows_class_and_speed(name: str, speed: float, expected: str) -> None:
    assert submission.attribute(name, speed) == expected


def test_a_detection_that_is_not_finite_is_refused() -> None:
    with pytest.raises(SubmissionError, match=r"sample abc.*detection 0 "):
        submission.records("abc", one_car(w=np.inf), np.eye(4), np.eye(4))


def test_results_of_another_split_are_refused(tiny_world: Path, tmp_path: Path) -> None:
    submission.write(tmp_path / "results.json", truth_records(open_split(tiny_world, "train")))
    with pytest.raises(EvaluationError, match=r"'val'.*\b4 of its 4 .*\b8 samples are not in the split"):
        nds.evaluate(tiny_world, VERSION, "val", tmp_path / "results.json")


def test_an_unknown_split_a_missing_dataset_and_missing_results_are_named_in_the_error(tiny_world: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    submission.write(results, {})
    with pytest.raises(EvaluationError, match=r"v1\.0-trainval.*'mini_val'.*train, val"):
        nds.evaluate(tiny_world, VERSION, "mini_val", results)
    with pytest.raises(EvaluationError, match="nuScenes tables"):
        nds.evaluate(tmp_path, VERSION, "val", results)
    with pytest.raises(EvaluationError, match=r"nothing\.json"):
        nds.evaluate(tiny_world, VERSION, "val", tmp_path / "nothing.json")
    results.write_text("[]")
    with pytest.raises(EvaluationError, match=r"results\.json"):
        nds.evaluate(tiny_world, VERSION, "val", results)
