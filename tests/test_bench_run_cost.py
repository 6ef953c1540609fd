"""ONNX files are measured in processes of their own; a file that cannot be run, or takes too long, is an error that names it."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
from small_networks import exported_network

from bench import run_cost
from export import to_onnx
from qdbev import artifact, detectors
from qdbev.artifact import ArtifactError, Seal
from qdbev.config import to_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.facts import TeacherFacts

IMAGE_HW = (64, 96)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of random weights as sealed ONNX."""
    config = exported_network()
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    parent = Seal(kind="teacher", config=to_dict(config), parent=None, facts=TeacherFacts(), provenance={}, sha256="0" * 64)
    frames = noise_frames(config.data, config.model.num_cameras, IMAGE_HW)
    to_onnx.export(detectors.build(config.model).eval(), parent, path, IMAGE_HW, frames)
    return path


def test_the_command_writes_time_ratio_and_memory_of_each_file(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("", ".seal.json"):
        shutil.copy(f"{network}{suffix}", tmp_path / f"other.onnx{suffix}")
    run_cost.main(["--onnx", str(network), str(tmp_path / "other.onnx"), "--turns", "2", "--out", str(tmp_path / "cost.json")])
    first, second = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert (first["file"], second["file"]) == ("net.onnx", "other.onnx")
    assert first["ratio"] == 1.0
    assert min(first["seconds"], second["seconds"], second["ratio"]) > 0
    assert 50 < second["peak_memory_mb"] < 2000
    assert "other.onnx" in capsys.readouterr().out


def test_a_file_that_cannot_be_run_is_named(network: Path, tmp_path: Path) -> None:
    model, made = onnx.load(network), artifact.unseal(network, "onnx")
    del model.graph.node[-1]
    onnx.save(model, tmp_path / "cut.onnx")
    artifact.seal(tmp_path / "cut.onnx", config=made.config, parent=None, facts=made.facts)
    with pytest.raises(ArtifactError, match=r"cut\.onnx cannot be measured: ArtifactError: "):
        run_cost.measure([network, tmp_path / "cut.onnx"], turns=1)


def test_a_file_that_takes_too_long_is_ended_and_named(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_cost, "RUN_LIMIT_S", 0.0)
    with pytest.raises(ArtifactError, match=r"net\.onnx cannot be measured: took more than 0 s"):
        run_cost.measure([network], turns=1)
