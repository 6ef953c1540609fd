"""A second detector is trained, quantized, exported, built and evaluated without a change of any room."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_detector

from engine import audit, build
from eval import engine_eval
from eval import run as eval_run
from export import pack, to_onnx
from export.runner import OnnxRunner
from qdbev import artifact
from qdbev.restore import restore
from train import qat, teacher


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    with toy_detector.installed():
        yield


@pytest.fixture(scope="module")
def run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy's teacher, its W4A6 student, ONNX and engine, made by the command lines of the rooms."""
    folder = tmp_path_factory.mktemp("toy")
    teacher.main(["--recipe", "toy", "--run", str(folder), "--set", f"data.root={tiny_world}", "--device", "cpu"])
    qat.main(["--teacher", str(folder / "teacher.pt"), "--student", str(folder / "w4a6.pt"), "--bits", "w4a6", "--device", "cpu"])
    to_onnx.main(["--checkpoint", str(folder / "w4a6.pt"), "--onnx", str(folder / "w4a6.onnx")])
    build.main(["--onnx", str(folder / "w4a6.onnx"), "--backend", "tensorrt-rtx"])
    return folder


def test_its_config_says_its_kind_and_comes_back(run):
    seal, model = restore(run / "w4a6.pt")
    assert seal.config["model"]["kind"] == "toy"
    assert isinstance(model, toy_detector.Toy)


def test_training_and_distillation_of_image_features_change_the_weights(run):
    losses = [json.loads(line) for line in (run / "w4a6.stage2.log.jsonl").read_text().splitlines()]
    assert all(entry["distill"] > 0 for entry in losses)
    (_, teacher_), (_, student) = restore(run / "teacher.pt"), restore(run / "w4a6.pt")
    assert not np.allclose(teacher_.head.reg_branches[0][0].weight.detach(), student.head.reg_branches[0][0].weight.detach())


def test_its_onnx_has_its_own_interface_and_no_custom_operator(run):
    runner = OnnxRunner(run / "w4a6.onnx")
    assert list(runner.interface.inputs) == ["images"]
    assert runner.interface.recurrent == ()
    assert runner.seal.facts.parity["cls_logits_cosine"] > 0.999


def test_its_engine_runs_every_quantized_layer_in_int8(run):
    report = audit.audit_files(run / "w4a6.engine", run / "w4a6.onnx")
    assert len(report.rows) > 5
    assert not report.offenders
    assert artifact.unseal(run / "w4a6.engine", "engine").facts.interface == OnnxRunner(run / "w4a6.onnx").interface


def test_it_is_evaluated_with_the_official_metric_and_compared_tensor_by_tensor(run):
    eval_run.main(["--model", str(run / "teacher.pt"), "--out", str(run / "eval" / "teacher_pt")])
    assert 0 <= json.loads((run / "eval" / "teacher_pt" / "metrics.json").read_text())["nds"] <= 1
    engine_eval.main(["--model", str(run / "w4a6.onnx"), "--out", str(run / "eval")])
    rows = json.loads((run / "eval" / "w4a6_onnx_compared.json").read_text())["rows"]
    assert {row["tensor"] for row in rows} == {"cls_logits", "box_code"}


def test_it_is_packed_and_gives_the_same_outputs(run):
    pack.main(["--student", str(run / "w4a6.pt"), "--packed", str(run / "w4a6.packed.pt")])
    assert (run / "w4a6.packed.pt").stat().st_size < (run / "w4a6.pt").stat().st_size / 2


def test_a_form_of_distillation_that_needs_a_bev_is_refused(run):
    arguments = ["--teacher", str(run / "teacher.pt"), "--student", str(run / "x.pt"), "--bits", "w4a6", "--device", "cpu"]
    with pytest.raises(SystemExit, match="form is 'guided', which needs BEV features; this detector has none: choose 'image'"):
        qat.main([*arguments, "--set", "quant.distill.form=guided"])
