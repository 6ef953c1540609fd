"""Settings and sealed files: round trips, and one clear error for each way they can be wrong."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from export import to_onnx
from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.config import from_dict, override, to_dict
from qdbev.facts import OnnxFacts, TeacherFacts
from qdbev.recipes import RECIPES, at_bits
from qdbev.schema import Interface
from qdbev.settings import ConfigError

FACTS = OnnxFacts(interface=Interface(inputs={"images": (1, 6, 3, 64, 64)}, outputs={"box_code": (1, 20, 10)}), bytes=5)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bits", ["w8a8", "w4a6", "w2a3"])
def test_a_config_survives_json(name, bits):
    config = at_bits(RECIPES[name](), bits)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_settings_are_typed_as_the_field_is():
    config = override(
        RECIPES["micro"](), ["train.epochs=3", "train.learning_rate=1", "model.bev_hw=(10, 12)", "data.root=/data/x", "train.amp=false"]
    )
    assert (config.train.epochs, config.train.learning_rate, config.model.bev_hw) == (3, 1.0, (10, 12))
    assert (config.data.root, config.train.amp) == ("/data/x", False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", "train has no 'epoch'; it has"),
        ("trian.epochs=3", "the config has no 'trian'"),
        ("train.epochs", "expected name=value"),
        ("train.epochs=many", r"train.epochs is 'many' \(str\), must be float"),
        ("train.epochs=0", "train.epochs is 0.0, must be positive"),
        ("train.amp=1", r"train.amp is 1 \(int\), must be bool"),
        ("train=3", "train is a group"),
        ("model.bev_hw=(1,2,3)", "must have 2 values"),
        ("model.backbone.style=keras", "must be one of 'pytorch', 'caffe'"),
        ("quant.bits.weight=9", "weight bits are 9, must be 2 to 8"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(setting, message):
    with pytest.raises(ConfigError, match=message):
        override(RECIPES["micro"](), [setting])


def save(path: Path, **changes) -> None:
    arguments = {"config": {"a": 1}, "weights": {"w": torch.arange(3.0)}, "parent": None, "facts": TeacherFacts(steps=2)}
    artifact.save_checkpoint(path, **{**arguments, **changes})


def test_a_checkpoint_carries_its_seal_and_its_weights(tmp_path):
    save(tmp_path / "a.pt")
    seal, weights, state = artifact.load_checkpoint(tmp_path / "a.pt", "teacher")
    assert (seal.kind, seal.config, seal.facts, state) == ("teacher", {"a": 1}, TeacherFacts(steps=2), None)
    assert seal.sha256 == artifact.sha256(tmp_path / "a.pt")
    assert "torch" in seal.provenance
    torch.testing.assert_close(weights["w"], torch.arange(3.0), atol=0, rtol=0)


def test_a_missing_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(ArtifactError, match="does not exist"):
        artifact.load_checkpoint(path, "teacher")
    save(path)
    with pytest.raises(ArtifactError, match="is a teacher file, a student is needed"):
        artifact.load_checkpoint(path, "student")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="damaged or no checkpoint"):
        artifact.load_checkpoint(path, "teacher")
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ArtifactError, match="no checkpoint of this project"):
        artifact.load_checkpoint(path, "teacher")


def test_a_sealed_file_is_known_again_and_a_changed_one_is_not(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"graph")
    sealed = artifact.seal(path, config={}, parent=None, facts=FACTS)
    assert artifact.unseal(path, "onnx") == sealed
    with pytest.raises(ArtifactError, match="is an onnx file, an engine is needed"):
        artifact.unseal(path, "engine")
    path.write_bytes(b"other")
    with pytest.raises(ArtifactError, match="is not the file that was sealed"):
        artifact.unseal(path, "onnx")
    artifact.seal_path(path).write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        artifact.unseal(path, "onnx")
    artifact.seal_path(path).unlink()
    with pytest.raises(ArtifactError, match="has no seal"):
        artifact.unseal(path, "onnx")


def test_an_artifact_made_from_something_else_is_refused(tmp_path):
    seals = {}
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        seals[name] = artifact.seal(tmp_path / name, config={}, parent=None, facts=FACTS)
    child = dataclasses.replace(seals["a"], parent=seals["a"].sha256)
    artifact.expect_parent(Path("engine"), child, tmp_path / "a", seals["a"])
    with pytest.raises(ArtifactError, match="build it again from this file"):
        artifact.expect_parent(Path("engine"), child, tmp_path / "b", seals["b"])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), artifact.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model.bev_hw={[]:1}",
            "model.bev_hw is '{",
        ),
        ("train.epochs=" + "9" * 400, "train.epochs is an integer of 1329 bits, too large"),
        ("train.max_grad_norm=1e400", "train.max_grad_norm is inf, must be a finite number"),
        ("model.num_query=-1", "model.num_query is -1, must be 1 or more"),
        ("model.bev_hw=(0,5)", r"model.bev_hw is \(0, 5\), must be 1 or more"),
        ("model.num_heads=0", "model.num_heads is 0, must be 1 or more"),
        ("train.code_weights=(1,2)", "train.code_weights has 2 values, must have 10"),
        ("quant.stages=[1]", r"quant.stages\[0\] must be a mapping, got 1"),
    ],
)
def test_a_value_that_no_run_could_use_is_one_clear_error(setting, message):
    with pytest.raises(ConfigError, match=message):
        override(RECIPES["micro"](), [setting])


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}"])
def test_a_seal_that_json_cannot_read_is_named(tmp_path, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"graph")
    artifact.seal_path(path).write_text(content)
    with pytest.raises(ArtifactError, match="a.onnx.seal.json cannot be read"):
        artifact.unseal(path, "onnx")


@pytest.mark.parametrize("content", [b"", b"hello\nworld"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ArtifactError, match="a.pt is damaged or no checkpoint"):
        artifact.load_checkpoint(tmp_path / "a.pt", "teacher")
    with pytest.raises(ArtifactError, match="is a folder; it should be a teacher checkpoint"):
        artifact.load_checkpoint(tmp_path, "teacher")


def test_a_target_is_refused_before_the_work(tmp_path):
    source = tmp_path / "a.pt"
    source.write_text("a")
    artifact.require_target(tmp_path / "new" / "b.pt", source, None)
    assert not (tmp_path / "new").exists()
    for target, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "." / "a.pt", "is read and"),
        (source / "b" / "c.pt", "a.pt is no folder"),
    ):
        with pytest.raises(ArtifactError, match=message):
            artifact.require_target(target, source)


def test_an_export_never_replaces_its_checkpoint(tmp_path):
    save(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(SystemExit, match="error: .*a.pt is read and cannot also be the file to write"):
        to_onnx.main(["--checkpoint", str(tmp_path / "a.pt"), "--onnx", str(tmp_path / "a.pt")])
    assert (tmp_path / "a.pt").read_bytes() == before
