"""ONNX files are measured in processes of their own; a file that cannot be run, or takes too long, is an error that names it."""

import json
import shutil
from pathlib import Path

import onnx
import pytest

from bench import run_cost
from qdbev import artifact
from qdbev.artifact import ArtifactError

NETWORK = Path(__file__).with_name("format1") / "w4a6.onnx"
"""A small network as sealed ONNX."""


def test_the_command_writes_time_ratio_and_memory_of_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("", ".seal.json"):
        shutil.copy(f"{NETWORK}{suffix}", tmp_path / f"other.onnx{suffix}")
    run_cost.main(["--onnx", str(NETWORK), str(tmp_path / "other.onnx"), "--turns", "2", "--out", str(tmp_path / "cost.json")])
    first, second = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert (first["file"], second["file"]) == ("w4a6.onnx", "other.onnx")
    assert first["ratio"] == 1.0
    assert min(first["seconds"], second["seconds"], second["ratio"]) > 0
    assert 50 < second["peak_memory_mb"] < 2000
    assert "other.onnx" in capsys.readouterr().out


def test_a_file_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    model, made = onnx.load(NETWORK), artifact.unseal(NETWORK, "onnx")
    del model.graph.node[-1]
    onnx.save(model, tmp_path / "cut.onnx")
    artifact.seal(tmp_path / "cut.onnx", config=made.config, parent=None, facts=made.facts)
    with pytest.raises(ArtifactError, match=r"cut\.onnx cannot be measured: ArtifactError: "):
        run_cost.measure([NETWORK, tmp_path / "cut.onnx"], turns=1)


def test_a_file_that_takes_too_long_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_cost, "RUN_LIMIT_S", 0.0)
    with pytest.raises(ArtifactError, match=r"w4a6\.onnx cannot be measured: took more than 0 s"):
        run_cost.measure([NETWORK], turns=1)
