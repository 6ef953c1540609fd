"""Evaluation from a model file to metrics, summary and pictures, on a small synthetic world and with the official metric."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sealed_facts import engine_facts, onnx_facts

from eval import draw, evaluate, pictures, report, run
from eval.loop import evaluate_frames
from eval.nds import EvaluationError
from eval.open_model import ModelFileError, SealedModel, open_model
from qdbev import artifact, detectors
from qdbev.artifact import ArtifactError, Seal
from qdbev.config import Config, to_dict
from qdbev.detector import Arrays
from qdbev.facts import TeacherFacts
from qdbev.frames import open_frames
from qdbev.recipes import RECIPES
from qdbev.schema import CLASSES


def micro(root: Path) -> Config:
    config = RECIPES["micro"]()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))


@pytest.fixture(scope="module")
def teacher(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro model with random weights."""
    path = tmp_path_factory.mktemp("run") / "teacher.pt"
    config = micro(tiny_world)
    torch.manual_seed(0)
    weights = detectors.build(config.model).state_dict()
    artifact.save_checkpoint(path, config=to_dict(config), weights=weights, parent=None, facts=TeacherFacts())
    return path


@pytest.fixture(scope="module")
def metrics(teacher: Path) -> dict[str, Any]:
    """The metrics that `python -m eval.run` writes for the teacher."""
    run.main(["--model", str(teacher)])
    return json.loads((teacher.parent / "eval" / "teacher_pt" / "metrics.json").read_text())


def recorder(config: Config, seen: list[Arrays], seal: Seal | None = None) -> SealedModel:
    """A model that appends its inputs to `seen`, puts the number of the call into its BEV, and finds no box within the range."""
    outputs_of = config.model.interface((96, 160)).outputs

    def run(inputs: Arrays) -> Arrays:
        seen.append(inputs)
        outputs = {name: np.zeros(shape, np.float32) for name, shape in outputs_of.items()}
        outputs["box_code"][...] = 1000.0
        outputs["box_code"][..., [2, 3, 5]] = 0
        outputs["bev"][...] = len(seen)
        return outputs

    return SealedModel(
        config,
        run,
        seal or Seal(kind="onnx", config=to_dict(config), parent=None, facts=onnx_facts(), provenance={}, sha256="0" * 64),
        "a recorder",
    )


def test_the_history_passes_from_frame_to_frame_and_ends_with_the_scene(tiny_world: Path) -> None:
    config = micro(tiny_world)
    seen: list[Arrays] = []
    scenes = [step.frame.scene_token for step in evaluate_frames(recorder(config, seen), open_frames(config, "train"))]
    assert len(set(scenes)) == 2
    assert set(seen[0]) == set(config.model.interface((96, 160)).inputs)
    starts = [index == 0 or scenes[index - 1] != scene for index, scene in enumerate(scenes)]
    assert [float(inputs["has_prev"][0]) for inputs in seen] == [0.0 if start else 1.0 for start in starts]
    for index, (inputs, start) in enumerate(zip(seen, starts, strict=True)):
        assert np.all(inputs["prev_bev"] == (0 if start else index))  # the call before gave its number as BEV
        moved = np.abs(inputs["can_bus"][0, :3]).max()
        assert (moved == 0) if start else (0 < moved < 20)
        assert all(value.dtype == np.float32 for value in inputs.values())


def test_a_random_model_is_scored_from_file_to_metrics(teacher: Path, metrics: dict[str, Any]) -> None:
    out = teacher.parent / "eval" / "teacher_pt"
    seal = artifact.unseal(out / "metrics.json", "metrics")
    assert seal.parent == metrics["sha256"] == artifact.sha256(teacher)
    assert metrics["predictions_sha256"] == artifact.unseal(out / "results_nusc.json", "predictions").sha256
    for name in ("nds", "map", "mate", "mase", "maoe", "mave", "maae"):
        assert 0 <= metrics[name] < 10, name
    assert tuple(metrics["class_ap"]) == tuple(metrics["class_tp"]) == CLASSES
    assert metrics["class_tp"]["traffic_cone"]["aoe"] is None
    assert (metrics["model"], metrics["kind"], metrics["bytes"]) == ("teacher.pt", "teacher", teacher.stat().st_size)
    assert (metrics["frames"], metrics["data"]["split"]) == (4, "val")
    assert 0 < metrics["seconds"]["model"] < metrics["seconds"]["frame"] * 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["teacher_pt"]  # no scratch folder is left


def test_a_checkpoint_has_the_inputs_and_outputs_of_the_deployed_graph(teacher: Path, tiny_world: Path) -> None:
    config = micro(tiny_world)
    frame = open_frames(config, "val").frame(0)
    with open_model(teacher) as model:
        outputs = model.run(model.stream.inputs(frame, None))
    assert {name: value.shape for name, value in outputs.items()} == config.model.interface(frame.images.shape[-2:]).outputs
    assert model.config == config


def test_a_model_that_finds_nothing_scores_zero(tiny_world: Path, tmp_path: Path) -> None:
    config = micro(tiny_world)
    (tmp_path / "none.onnx").write_bytes(b"")
    content = evaluate.evaluate(tmp_path / "none.onnx", recorder(config, []), config, "val", tmp_path / "out")
    assert (content["nds"], content["map"], content["boxes"]) == (0, 0, 1)  # one box far away keeps the devkit going


def test_a_failed_evaluation_leaves_the_earlier_files(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = micro(tiny_world)
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("earlier")

    def fail(*_: object) -> None:
        raise EvaluationError("no metric today")

    monkeypatch.setattr(evaluate.nds, "evaluate", fail)
    with pytest.raises(EvaluationError, match="today"):
        evaluate.evaluate(tmp_path / "m.onnx", recorder(config, []), config, "val", out)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["metrics.json"]


@pytest.mark.parametrize("suffix", [".pth", ""])
def test_an_unknown_model_suffix_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ModelFileError, match=r"\.pt, \.onnx, \.engine"), open_model(tmp_path / f"model{suffix}"):
        pass


def test_a_missing_model_and_a_wrong_device_are_named_in_the_error(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.onnx does not exist"), open_model(tmp_path / "gone.onnx"):
        pass
    with pytest.raises(ModelFileError, match="onnxruntime .*'cuda'"), open_model(tmp_path / "m.onnx", "cuda"):
        pass
    with pytest.raises(ValueError, match="'gpu'"), open_model(teacher, "gpu"):
        pass


@pytest.mark.parametrize("wrong", [("--split", "moon"), ("--data", "nowhere")])
def test_the_command_ends_with_one_clear_line(teacher: Path, tmp_path: Path, wrong: tuple[str, str]) -> None:
    with pytest.raises(SystemExit, match=rf"^error: [^\n]*{wrong[1]}[^\n]*$"):
        run.main(["--model", str(teacher), *wrong, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_absent_classes_are_warned_about() -> None:
    data = {"version": "v1.0-trainval", "split": "val"}
    assert evaluate.warnings({"absent": [], "data": data}) == []
    assert "no scored bus, trailer" in evaluate.warnings({"absent": ["bus", "trailer"], "data": data})[0]


def test_summary_has_a_row_per_model_with_the_change_from_its_parent(
    teacher: Path, metrics: dict[str, Any], tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = teacher.parent, micro(tiny_world)
    engine = folder / "w8a8.engine"
    engine.write_bytes(b"plan")
    seal = Seal(kind="engine", config=to_dict(config), parent=metrics["sha256"], facts=engine_facts(), provenance={}, sha256="1" * 64)
    evaluate.evaluate(engine, recorder(config, [], seal), config, "val", folder / "eval" / "w8a8_engine")
    counts = {"quantized_layers": 9, "int8_layers": 8, "kernels": 20, "int8_kernels": 8, "requantizations": 3}
    (folder / "w8a8.engine.audit.json").write_text(json.dumps({"summary": "8 of 9", **counts, "rows": []}))
    report.main(["--run", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    rows = summary["rows"]
    assert [row["name"] for row in rows] == ["teacher_pt", "w8a8_engine"]
    assert rows[0]["nds"] == metrics["nds"]
    assert rows[0]["parent"] is None
    assert (rows[1]["parent"], rows[1]["nds_from_parent"]) == ("teacher_pt", pytest.approx(-metrics["nds"]))
    assert isinstance(rows[1]["seconds"], float)
    assert summary["engines"] == [{"name": "w8a8.engine", "bytes": 4, "summary": "8 of 9", **counts}]
    shown = capsys.readouterr().out.splitlines()
    assert any("w8a8_engine" in line and f"{-metrics['nds']:+.3f}" in line for line in shown)  # whole in 80 columns
    assert any(line.split()[:4] == ["w8a8.engine", "9", "8", "20"] for line in shown)


def test_a_run_without_metrics_and_an_altered_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"metrics\.json.*python -m eval\.run"):
        report.collect(tmp_path)
    path = tmp_path / "eval" / "teacher_pt" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="metrics.json .*seal"):
        report.collect(tmp_path)


def test_pictures_are_drawn_for_the_frames_asked_for(teacher: Path, tmp_path: Path) -> None:
    pictures.main(["--model", str(teacher), "--out", str(tmp_path), "--frames", "1", "--threshold", "0.012"])
    drawn = list(tmp_path.iterdir())
    assert [path.name for path in drawn] == ["frame_00002.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")


def test_the_front_of_a_box_is_where_its_yaw_points() -> None:
    box = np.array([[1.0, 2.0, 3.0, 2.0, 4.0, 1.5, -np.pi / 2, 0.0, 0.0]])  # SECOND yaw: the front points along x
    points = draw.corners(box)[0]
    np.testing.assert_allclose(points[[0, 1, 4, 5]].mean(0), [3.0, 2.0, 3.0], atol=1e-12)
    np.testing.assert_allclose(np.ptp(points, axis=0), [4.0, 2.0, 1.5], atol=1e-12)


def test_boxes_behind_a_camera_are_not_drawn_and_those_around_it_are_clipped() -> None:
    lidar2img = np.array([[100.0, 50.0, 0.0, 0.0], [0.0, 40.0, -100.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])  # looks along y
    boxes = np.array([[0.0, y, 0.0, 2.0, 4.0, 1.5, 0.0, 0.0, 0.0] for y in (10.0, -10.0, 1.0)])
    seen = draw.project_edges(draw.corners(boxes), lidar2img, 100, 80)
    assert sorted(seen) == [0, 2]
    np.testing.assert_allclose(seen[0].reshape(-1, 2).mean(0), [50, 40], atol=1e-9)
    assert len(seen[0]) == 12
    assert len(seen[2]) == 8  # the four edges of the rear face are behind the camera
    np.testing.assert_allclose(np.abs(seen[2][..., 0] - 50).max(), 100 * 1.0 / 0.2)  # one metre aside, clipped 0.2 m in front of the camera
