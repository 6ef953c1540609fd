"""Writing a synthetic world: reproducible bytes, resuming an interrupted run, and refusing unsuitable folders and settings."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from synthetic import generate as entry
from synthetic.config import WorldConfig, micro, street
from synthetic.generate import MARKER, generate
from synthetic.scene_files import replace_text, write_scene
from synthetic.scene_names import TRAIN_NAMES


def smallest() -> WorldConfig:
    return dataclasses.replace(micro(), name="smallest", num_train=2, num_val=1, num_samples=2, image_hw=(90, 160))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smallest")
    assert generate(smallest(), folder)
    return folder


def _contents(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _files_of(root: Path, scene_names: tuple[str, ...]) -> list[Path]:
    """Images, sweeps and CAN bus files of some scenes."""
    files = [path for name in scene_names for path in (*root.glob(f"samples/*/*{name[-4:]}__*"), *root.glob(f"can_bus/{name}_*"))]
    assert len(files) == len(scene_names) * (2 * 7 + 3)
    return files


def test_two_workers_write_the_same_bytes_as_one(root: Path, tmp_path: Path) -> None:
    generate(smallest(), tmp_path, num_workers=2)
    assert _contents(tmp_path) == _contents(root)


def test_another_seed_gives_another_world(root: Path, tmp_path: Path) -> None:
    generate(dataclasses.replace(smallest(), seed=1, num_train=1, num_val=0), tmp_path)
    annotations = "v1.0-trainval/sample_annotation.json"
    sizes = [{tuple(record["size"]) for record in json.loads((folder / annotations).read_text())} for folder in (root, tmp_path)]
    assert not sizes[0] & sizes[1]


def test_a_scene_does_not_depend_on_the_number_of_other_scenes(root: Path, tmp_path: Path) -> None:
    generate(dataclasses.replace(smallest(), num_train=1, num_val=0), tmp_path)
    alone, among = _contents(tmp_path), _contents(root)
    images = [path for path in alone if path.endswith((".jpg", ".bin"))]
    assert len(images) == 2 * 7
    assert all(alone[path] == among[path] for path in images)


def test_an_interrupted_run_is_finished_without_rendering_scenes_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write_then_interrupt(folder: Path, config: WorldConfig, name: str) -> None:
        if len(written) == 2:
            image = next((folder / "samples" / "CAM_FRONT").iterdir())
            image.with_name("half-written.jpg").write_bytes(b"")
            (folder / "parts" / f"{name}.json.partial").write_text('{"tables": {')
            raise KeyboardInterrupt
        written.append(name)
        write_scene(folder, config, name)

    monkeypatch.setattr(entry, "write_scene", write_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(smallest(), tmp_path)
    assert not json.loads((tmp_path / MARKER).read_text())["complete"]
    assert not (tmp_path / "v1.0-trainval").exists()

    monkeypatch.undo()
    first_scenes = {path: path.stat().st_mtime_ns for path in _files_of(tmp_path, smallest().scene_names[:2])}
    assert generate(smallest(), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in first_scenes} == first_scenes
    (tmp_path / "samples" / "CAM_FRONT" / "half-written.jpg").unlink()
    assert _contents(tmp_path) == _contents(root)


def test_a_partly_written_record_does_not_count_as_a_finished_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def write_half(path: Path, text: str) -> None:
        write_text(path, text[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk full"):
        replace_text(tmp_path / "record.json", '{"files": "abc"}')
    assert not (tmp_path / "record.json").exists()


def test_a_complete_world_is_left_alone(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not generate(smallest(), root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match=f"is not empty and has no {MARKER}"):
        generate(smallest(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_with_another_world_is_refused(root: Path) -> None:
    before = _contents(root)
    with pytest.raises(ValueError, match="num_samples is 2 there, 3 was asked for"):
        generate(dataclasses.replace(smallest(), num_samples=3), root)
    assert _contents(root) == before


def test_an_unknown_world_is_refused_with_the_names_of_the_known_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        entry.main(["--world", "atlantis", "--out", str(tmp_path)])
    assert caught.value.code != 0
    error = capsys.readouterr().err
    assert all(word in error for word in ("atlantis", "micro", "street"))


def test_the_command_writes_a_world_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--world", "micro", "--out", str(tmp_path / "world"), "--scenes", "0", "1", "--workers", "1"]
    entry.main(arguments)
    assert f"{tmp_path / 'world'}: written" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "world/v1.0-trainval/scene.json").read_text())) == 1
    entry.main(arguments)
    assert "already complete, nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", "maze"),
        ("num_train", len(TRAIN_NAMES) + 1),
        ("num_samples", 0),
        ("image_hw", (180, 180)),
        ("ego_speed", (8.0, 2.0)),
        ("jpeg_quality", 0),
        ("lidar_stride", 0),
    ],
)
def test_settings_without_a_possible_world_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} = .* is not allowed; choose"):
        dataclasses.replace(micro(), **{field: value})


def test_an_impossible_number_of_objects_is_refused_with_the_settings_to_change(tmp_path: Path) -> None:
    config = dataclasses.replace(smallest(), object_density=0.001, mean_annotated=(500.0, 501.0))
    with pytest.raises(ValueError, match="change object_density"):
        generate(config, tmp_path)


def test_the_street_world_is_full_size_and_has_all_can_messages(tmp_path: Path) -> None:
    config = dataclasses.replace(street(), num_train=1, num_val=0, num_samples=1)
    generate(config, tmp_path)
    assert config.image_hw == (900, 1600)
    messages = {path.stem.split("_", 1)[1] for path in (tmp_path / "can_bus").iterdir()}
    assert messages == {
        *("meta", "ms_imu", "pose", "route", "steeranglefeedback", "vehicle_monitor", "zoe_veh_info", "zoesensors"),
    }
