"""ONNX files are measured in processes of their own; a file that cannot be run, or takes too long, is an error that names it."""

import json
import shutil
from pathlib import Path

import onnx
import pytest

from bench import run_cost
from engine import build
from engine.plan import Options
from qdbev import artifact
from qdbev.artifact import ArtifactError

NETWORK = Path(__file__).with_name("format1") / "w4a6.onnx"
"""A small W4A6 network as sealed ONNX."""


def test_the_command_writes_time_ratio_and_memory_of_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("", ".seal.json"):
        shutil.copy(f"{NETWORK}{suffix}", tmp_path / f"other.onnx{suffix}")
    run_cost.main(["--models", str(NETWORK), str(tmp_path / "other.onnx"), "--turns", "2", "--out", str(tmp_path / "cost.json")])
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


def test_the_verdict_compares_the_engines_in_float_and_on_integers() -> None:
    rows = [
        {"file": name, "seconds": seconds, "int8_layers": layers}
        for name, seconds, layers in (
            ("t.pt", 9.0, 0),
            ("t.cpu.engine", 6.0, 0),
            ("w8a8.cpu.engine", 4.0, 52),
            ("w4a6.cpu.engine", 3.0, 52),
        )
    ]
    assert run_cost.verdict(rows) == "integers pay on this CPU: the fastest integer engine takes 1/2.00 of the time of the float engine"
    assert run_cost.verdict([{**row, "seconds": 6.0} for row in rows]).startswith("integers do not pay")
    assert run_cost.verdict(rows[:2]) == ""


def test_checkpoint_onnx_and_engine_are_measured_beside_each_other(tmp_path: Path) -> None:
    for name in ("w4a6.pt", "w4a6.onnx", "w4a6.onnx.seal.json"):
        shutil.copy(NETWORK.parent / name, tmp_path)
    build.build_file(tmp_path / "w4a6.onnx", tmp_path / "w4a6.cpu.engine", Options(backend="cpu"))
    rows = run_cost.measure([tmp_path / f"w4a6.{kind}" for kind in ("pt", "onnx", "cpu.engine")], turns=1, threads=1)
    assert [row["int8_layers"] for row in rows] == [0, 0, 52]
    assert all(row["seconds"] > 0 for row in rows)
