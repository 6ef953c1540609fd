"""Sensitivity of layers to quantization: measured one by one, used to choose bit widths within a budget, and trained with."""

import json
import math

import pytest
import torch
from small_networks import settings
from small_trainings import CPU, untrained_teacher

from bench.untrained import untrained
from qdbev import artifact
from qdbev.config import Config, override
from qdbev.data.dataset import FrameDataset
from qdbev.facts import TeacherFacts
from qdbev.quant.config import Bits, LayerBits
from qdbev.quant.layers import WeightLayer, quant_layers
from qdbev.recipes import RECIPES, at_bits
from qdbev.restore import restore
from train import calibration, qat, sensitivity
from train.sensitivity import Sensitivity

ANOTHER = artifact.Seal(kind="teacher", config={}, parent=None, facts=TeacherFacts(), provenance={}, sha256="0" * 64)
"""Seal of a teacher that nothing was measured with."""
SETTINGS = settings(model__decoder_layers="1", quant__stages="[]")


@pytest.fixture(scope="module")
def config(tiny_world) -> Config:
    return at_bits(override(RECIPES["micro"](), [*SETTINGS, f"data.root={tiny_world}"]), "w4a6")


@pytest.fixture(scope="module")
def frames(config) -> FrameDataset:
    return FrameDataset(config.data, config.model.pc_range, "train", training=False, seed=0)


@pytest.fixture(scope="module")
def rows(config, frames) -> list[Sensitivity]:
    patch = pytest.MonkeyPatch()
    patch.setattr(sensitivity, "WIDTHS", (2, 4, 8))
    patch.setattr(sensitivity, "NUM_QUEUES", 2)
    found = sensitivity.measure(untrained(config), config, frames, CPU)
    patch.undo()
    return found


def test_every_weight_and_activation_is_measured_alone_and_more_bits_increase_the_loss_less(rows):
    names = {row.layer for row in rows}
    assert {"backbone.conv1", "encoder.layers.0.ffn.linear1", "encoder.bev_embedding", "head.reg_branches.0.4"} <= names
    by_width = {bits: [row for row in rows if row.bits == bits] for bits in (2, 4, 8)}
    assert [(row.layer, row.part) for row in by_width[2]] == [(row.layer, row.part) for row in by_width[8]]
    mean = {bits: sum(row.loss_increase for row in found) / len(found) for bits, found in by_width.items()}
    assert mean[2] > 3 * mean[4] > 9 * mean[8] > 0
    assert all(0 < row.bev_snr < 150 for row in rows if row.layer == "backbone.conv1")
    head = [row for row in rows if row.layer.startswith(("decoder.", "head."))]
    assert min(row.bev_snr for row in head) > 120, "the BEV does not depend on what comes after it"


@pytest.mark.parametrize("budget", ["size", "bops"])
def test_the_choice_costs_no_more_than_the_uniform_policy_and_increases_the_loss_less(rows, config, frames, budget):
    teacher = untrained(config)
    chosen = sensitivity.choose(rows, teacher, config, frames, budget, CPU)
    increase = {(row.layer, row.bits): row.loss_increase for row in rows if row.part == "weight"}
    student = calibration.calibrated_student(untrained(config), config, frames, CPU)
    weights = {name: layer for name, layer in quant_layers(student) if isinstance(layer, WeightLayer)}
    assert chosen.keys() == weights.keys()
    uniform = {name: layer.weight_quantizer.num_bits for name, layer in weights.items()}
    assert sum(increase[name, bits] for name, bits in chosen.items()) < sum(increase[name, bits] for name, bits in uniform.items())
    if budget == "size":
        size = {name: layer.weight_quantizer.rows(next(layer.parameters())).numel() for name, layer in weights.items()}
        assert sum(size[name] * bits for name, bits in chosen.items()) <= sum(size[name] * bits for name, bits in uniform.items())


def test_the_command_writes_a_file_that_training_takes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "WIDTHS", (3, 8))
    monkeypatch.setattr(sensitivity, "NUM_QUEUES", 1)
    untrained_teacher(config, tmp_path / "t.pt")
    out = tmp_path / "widths.json"
    sensitivity.main(["--teacher", str(tmp_path / "t.pt"), "--bits", "w4a6", "--budget", "size", "--out", str(out), "--device", "cpu"])
    widths = sensitivity.read_widths(out)
    assert {entry.layers: entry.bits.weight for entry in widths} == json.loads(out.read_text())["chosen"]
    student = ["--student", str(tmp_path / "s.pt"), "--bits", "w4a6", "--widths", str(out), "--device", "cpu"]
    qat.main(["--teacher", str(tmp_path / "t.pt"), *student])
    _, student = restore(tmp_path / "s.pt")
    got = {name: layer.weight_quantizer.num_bits for name, layer in quant_layers(student) if isinstance(layer, WeightLayer)}
    assert got == json.loads(out.read_text())["chosen"]

    monkeypatch.setattr(sensitivity, "measure", None)
    again = tmp_path / "again.json"
    other = ["--bits", "w3a3", "--budget", "size", "--measured", str(out), "--out", str(again)]
    sensitivity.main(["--teacher", str(tmp_path / "t.pt"), *other, "--device", "cpu"])
    assert json.loads(again.read_text())["rows"] == json.loads(out.read_text())["rows"]
    assert sum(json.loads(again.read_text())["chosen"].values()) < sum(got.values())
    with pytest.raises(ValueError, match="was measured with another teacher than 000000000000; measure anew, without --measured"):
        sensitivity.read_rows(out, ANOTHER)


def test_a_file_of_an_earlier_version_that_calls_the_loss_increase_harm_is_read(tmp_path):
    row = Sensitivity("backbone.conv1", "weight", 4, 20.5, 0.25)
    old = {("harm" if name == "loss_increase" else name): value for name, value in row._asdict().items()}
    (tmp_path / "old.json").write_text(json.dumps({"teacher": "0" * 64, "rows": [old]}))
    assert sensitivity.read_rows(tmp_path / "old.json", ANOTHER) == [row]


def test_layers_with_widths_of_their_own_keep_the_policys_activations(config):
    chosen = sensitivity.layer_bits({"encoder.layers.0.ffn.linear1": 3, "backbone.conv1": 5}, config)
    assert chosen == (
        LayerBits(layers="encoder.layers.0.ffn.linear1", bits=Bits(weight=3, activation=6)),
        LayerBits(layers="backbone.conv1", bits=Bits(weight=5, activation=8)),
    )


def test_a_file_that_holds_no_widths_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no file of widths"):
        sensitivity.read_widths(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="is no file of widths"):
        sensitivity.read_widths(tmp_path / "x.json")
    with pytest.raises(ValueError, match="is no file of widths"):
        sensitivity.read_rows(tmp_path / "x.json", None)


def test_signal_to_noise_is_in_decibels():
    clean = torch.ones(100)
    assert sensitivity._snr(clean + 0.1, clean) == pytest.approx(20, abs=1e-4)
    assert sensitivity._snr(clean, clean) == pytest.approx(150)
    assert math.isfinite(sensitivity._snr(clean * 0, clean))
