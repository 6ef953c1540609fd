"""Commands refuse what cannot work before they work: wrong outputs, settings and files, each with one line."""

import json
from pathlib import Path

import pytest
import torch
from small_networks import settings
from small_trainings import untrained_teacher

from bench import ablation, run_cost, step_cost
from engine import audit
from eval import pictures, run
from qdbev import artifact, command
from qdbev.artifact import ArtifactError
from qdbev.config import override
from qdbev.nn.state_dict import StateDictError, read_state_dict
from qdbev.recipes import RECIPES
from qdbev.settings import ConfigError
from synthetic import generate
from train import qat, sensitivity


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return untrained_teacher(override(RECIPES["micro"](), settings(data__root=str(tmp_path / "absent"))), tmp_path / "t.pt")


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (sensitivity.main, ["--teacher", "t.pt", "--bits", "w4a6", "--budget", "size", "--out", "t.pt"]),
        (step_cost.main, ["--teacher", "t.pt", "--bits", "w4a6", "--out", "t.pt"]),
        (run_cost.main, ["--models", "n.onnx", "--out", "n.onnx"]),
        (audit.main, ["--engine", "e.engine", "--onnx", "n.onnx", "--out", "e.engine.seal.json"]),
        (audit.main, ["--engine", "e.engine", "--onnx", "n.onnx", "--out", "e.engine.layers.json"]),
    ],
)
def test_an_output_that_is_read_too_is_refused_and_stays(main, options, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(teacher.parent)
    target = Path(options[-1])
    if not target.exists():
        target.write_bytes(b"content")
    before = target.read_bytes()
    with pytest.raises(SystemExit, match=r"^error: \S+ is read and cannot also be the file to write; give another path$"):
        main(options)
    assert target.read_bytes() == before


@pytest.mark.parametrize("main", [run.main, pictures.main])
def test_a_file_where_a_folder_is_to_be_written_is_refused_before_the_model_is_opened(main, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"file is a file; give the path of a folder$"):
        main(["--model", str(tmp_path / "absent.onnx"), "--out", str(tmp_path / "file")])
    with pytest.raises(ArtifactError, match="is a file"):
        artifact.require_folder(tmp_path / "file")
    artifact.require_folder(tmp_path / "new" / "folder")


@pytest.mark.parametrize("setting", ["model.decoder_layers=1", "model.num_pillar_points=2", "model.dropout=0.2"])
def test_a_student_keeps_the_network_of_its_teacher(setting: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: --set model\.\* does not fit a trained network"):
        qat.main(["--teacher", str(teacher), "--student", str(tmp_path / "s.pt"), "--bits", "w4a6", "--set", setting])
    assert not (tmp_path / "s.pt").exists()


@pytest.mark.parametrize("every", ["-1", "0", "nan", "inf"])
def test_students_are_kept_at_a_positive_interval(every: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: --keep-every \S+ must be a positive number of epochs$"):
        qat.main(["--teacher", str(teacher), "--student", str(tmp_path / "s.pt"), "--bits", "w4a6", "--keep-every", every])


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_devices_that_are_neither_cpu_nor_cuda_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device '{name}' is not supported; use cpu, cuda"):
        command.parse_device(name)


@pytest.mark.parametrize(
    "content",
    [
        b'{"layer_bits": [{"layers": ["x"], "bits": {"weight": 4}}]}',
        b'{"layer_bits": [{"layers": 5, "bits": {"weight": 4}}]}',
        b'{"layer_bits": [{"layers": "x", "bits": {"weight": 4.5}}]}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"layer_bits": 3}',
    ],
)
def test_a_damaged_file_of_widths_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "widths.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"widths\.json is no file of widths"):
        sensitivity.read_widths(tmp_path / "widths.json")


@pytest.mark.parametrize("marker", ["{", "{}", "[]", "3", '{"format": 1}'])
def test_a_damaged_marker_of_a_world_is_named(marker: str, tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text(marker)
    with pytest.raises(SystemExit, match=r"world\.json is damaged \(.*\); delete the folder, or choose another --out$"):
        generate.main(["--world", "micro", "--out", str(tmp_path)])


def test_a_marker_without_its_last_entry_is_damaged_too(tmp_path: Path) -> None:
    marker = json.loads(generate._marker_text(generate.WORLDS["micro"]()))
    del marker["complete"]
    (tmp_path / "world.json").write_text(json.dumps(marker))
    with pytest.raises(SystemExit, match=r"world\.json is damaged"):
        generate.main(["--world", "micro", "--out", str(tmp_path)])


def test_other_counts_of_classes_and_jobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_classes is 3; schema\.CLASSES has 10 classes"):
        override(RECIPES["micro"](), ["model.num_classes=3"])
    with pytest.raises(SystemExit, match="--jobs 0 must be at least 1"):
        ablation.main(["--teacher", str(tmp_path / "t.pt"), "--jobs", "0"])


def test_a_checkpoint_whose_keys_are_no_names_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {1: torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(StateDictError, match="holds no state dict"):
        read_state_dict(tmp_path / "x.pth")
