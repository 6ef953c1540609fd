"""Files written before seals and configs had a format version open unchanged, and files of a later version are refused.

tests/format1 holds a teacher, a W4A6 student, its packed form, its ONNX, the seals of its engine and of metrics, made on 2026-11-29 at
commit 18d7a6c with the micro recipe shrunk as in small_networks.TRAINED, and in outputs.json the sum and seven values of each output on
the second of two noise frames, computed by that commit.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from export.runner import OnnxRunner
from qdbev import artifact, detectors
from qdbev.artifact import ArtifactError
from qdbev.config import from_dict, to_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Arrays, Deployed, run_stream
from qdbev.recipes import RECIPES
from qdbev.restore import restore
from qdbev.settings import ConfigError

OLD = Path(__file__).with_name("format1")
WANTED = json.loads((OLD / "outputs.json").read_text())


def second_frame(run, config) -> Arrays:
    """Outputs on the second of two noise frames."""
    frames = noise_frames(config.data, 6, (64, 64))
    return list(run_stream(detectors.stream(config.model), run, frames))[-1].outputs


def sampled(values: np.ndarray) -> list[float]:
    """Sum and seven values, as in outputs.json."""
    return [float(np.float64(values).sum()), *values.ravel()[:: max(values.size // 7, 1)][:7].tolist()]


@pytest.mark.parametrize("name", ["teacher", "w4a6", "w4a6.packed"])
def test_an_old_checkpoint_computes_what_it_computed(name):
    seal, model = restore(OLD / f"{name}.pt")
    assert seal.facts.image_hw == (64, 64)
    with torch.no_grad():
        outputs = second_frame(Deployed(model).run, from_dict(seal.config))
    for output, wanted in WANTED[name].items():
        # A last bit of another CPU may move a rounding of a quantized network by a step.
        np.testing.assert_allclose(sampled(outputs[output])[1:], wanted[1:], atol=1e-4 if name == "teacher" else 0.1)


def test_an_old_onnx_file_opens_and_has_an_interface():
    runner = OnnxRunner(OLD / "w4a6.onnx")
    assert tuple(runner.interface.inputs) == ("images", "lidar2img", "can_bus", "prev_bev", "has_prev")
    assert runner.seal.facts.parity["bev_cosine"] > 0.99
    outputs = second_frame(runner, from_dict(runner.seal.config))
    np.testing.assert_allclose(sampled(outputs["cls_logits"])[1:], WANTED["w4a6"]["cls_logits"][1:], atol=0.1)


def test_an_old_onnx_file_with_the_plugin_of_tensorrt_8_is_refused(tmp_path):
    shutil.copy(OLD / "w4a6.onnx", tmp_path / "w4a6.onnx")
    values = json.loads((OLD / "w4a6.onnx.seal.json").read_text())
    values["facts"]["builtin_plugin"] = True
    (tmp_path / "w4a6.onnx.seal.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="exported with --builtin-plugin, which is no longer supported; export it again without"):
        artifact.unseal(tmp_path / "w4a6.onnx", "onnx")


def test_the_seal_of_an_old_engine_says_what_it_was_built_for(tmp_path):
    (tmp_path / "w4a6.engine").write_bytes(b"plan")
    values = json.loads((OLD / "w4a6.engine.seal.json").read_text())
    values["sha256"] = artifact.sha256(tmp_path / "w4a6.engine")
    (tmp_path / "w4a6.engine.seal.json").write_text(json.dumps(values))
    facts = artifact.unseal(tmp_path / "w4a6.engine", "engine").facts
    assert (facts.backend.name, facts.target.compute_capabilities) == ("tensorrt-rtx", None)
    assert facts.interface == OnnxRunner(OLD / "w4a6.onnx").interface
    assert facts.audit["int8_layers"] == facts.audit["quantized_layers"] > 0


def test_old_metrics_open():
    assert artifact.unseal(OLD / "metrics.json", "metrics").facts.nds == json.loads((OLD / "metrics.json").read_text())["nds"]


@pytest.mark.parametrize("what", ["seal", "config"])
def test_a_file_of_a_later_version_is_refused_in_one_sentence(tmp_path, what):
    shutil.copy(OLD / "w4a6.onnx", tmp_path / "w4a6.onnx")
    values = json.loads((OLD / "w4a6.onnx.seal.json").read_text())
    (values if what == "seal" else values["config"])["format"] = 99
    (tmp_path / "w4a6.onnx.seal.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=rf"the {what} is of format 99, .* made by a later version: update qdbev"):
        artifact.unseal(tmp_path / "w4a6.onnx", "onnx")


def test_settings_that_no_longer_exist_are_left_out_with_a_warning(caplog):
    old = json.loads((OLD / "w4a6.onnx.seal.json").read_text())["config"]
    old["quant"]["distill"]["axis"] = "space"
    old["quant"]["calibration"] = "entropy"
    config = from_dict(old)
    assert "quant.distill.axis='space', quant.calibration='entropy'" in caplog.text
    assert config.quant.calibration == "mse"


def test_old_bit_widths_of_groups_become_exceptions():
    old = json.loads((OLD / "w4a6.onnx.seal.json").read_text())["config"]
    assert from_dict(old).quant.group_bits == ()
    old["quant"]["neck"] = {"weight": 8, "activation": 8}
    (exception,) = from_dict(old).quant.group_bits
    assert (exception.group, exception.bits.weight) == ("neck", 8)


def test_a_present_config_is_not_migrated_again():
    config = RECIPES["tiny"]()
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ConfigError, match="format 0"):
        from_dict({**to_dict(config), "format": 0})


@pytest.mark.parametrize("found", [True, "2", 0, -1, None, 1.0])
@pytest.mark.parametrize("what", ["seal", "config"])
def test_a_format_that_is_no_version_is_refused(tmp_path, what, found):
    values = resealed(tmp_path)
    (values if what == "seal" else values["config"])["format"] = found
    (tmp_path / "w4a6.onnx.seal.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=rf"w4a6.onnx.seal.json .*the {what} is of format {found!r}, .* damaged or was edited"):
        artifact.unseal(tmp_path / "w4a6.onnx", "onnx")


def resealed(folder: Path) -> dict:
    """The old ONNX in `folder` with a seal of the present format; returns the seal's values."""
    shutil.copy(OLD / "w4a6.onnx", folder / "w4a6.onnx")
    old = artifact.unseal(OLD / "w4a6.onnx", "onnx")
    artifact.seal(folder / "w4a6.onnx", config=to_dict(from_dict(old.config)), parent=old, facts=old.facts)
    return json.loads((folder / "w4a6.onnx.seal.json").read_text())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", [], r"its kind is \[\]"),
        ("config", 3, "a config must be a mapping"),
        ("parent", 3, r"parent is 3 \(int\), must be str"),
        ("sha256", None, "sha256 is None"),
        ("provenance", {"utc": 1}, "provenance.utc is 1"),
    ],
)
def test_every_field_of_a_seal_has_its_type(tmp_path, name, value, message):
    values = resealed(tmp_path)
    (tmp_path / "w4a6.onnx.seal.json").write_text(json.dumps({**values, name: value}))
    with pytest.raises(ArtifactError, match=f"w4a6.onnx.seal.json cannot be read: {message}"):
        artifact.unseal(tmp_path / "w4a6.onnx", "onnx")


@pytest.mark.parametrize(("name", "value"), [("model", None), ("quant", []), ("quant", {"distill": 3}), ("quant", {"stages": 3})])
def test_an_old_config_of_the_wrong_form_is_refused_in_one_sentence(name, value):
    old = json.loads((OLD / "w4a6.onnx.seal.json").read_text())["config"]
    with pytest.raises(ConfigError, match=r"the config does not have the form of format 1 \(.*\); it is damaged or was edited"):
        from_dict({**old, name: value})


def test_a_seal_of_the_present_form_that_lost_its_format_keeps_its_provenance(tmp_path):
    values = resealed(tmp_path)
    del values["format"]
    (tmp_path / "w4a6.onnx.seal.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="does not have the form of format 1"):
        artifact.unseal(tmp_path / "w4a6.onnx", "onnx")


def test_a_checkpoint_with_a_changed_byte_is_refused(tmp_path):
    content = bytearray((OLD / "teacher.pt").read_bytes())
    content[len(content) // 2] ^= 1  # inside a tensor
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a.pt is damaged: the content of .* does not fit its checksum"):
        restore(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": None}, "weights are missing"),
        ({"weights": {3: torch.ones(1)}}, "weights are missing or are no tensors with names"),
        ({"weights": {}}, "weights do not fit the checkpoint's own config"),
        ({"config": {"format": 99}}, "the config is of format 99"),
        ({"config": {"format": 2, "name": "x"}}, r"the config of .*a.pt cannot be read: config lacks data, model"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line(tmp_path, changes, message):
    content = torch.load(OLD / "teacher.pt", weights_only=True)
    if "config" in changes:
        changes = {"seal": {**content["seal"], **changes}}
    torch.save({**content, **changes}, tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match=message) as caught:
        restore(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert "a.pt" in str(caught.value)
