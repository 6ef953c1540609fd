"""The completeness check reports everything that a dataset lacks, with the archive to unpack, and requires nothing that is not needed."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qdbev.data import build_infos
from qdbev.data.build_infos import load_or_build
from qdbev.data.config import DataConfig
from qdbev.data.infos import DatasetError
from qdbev.data.nuscenes import completeness
from qdbev.schema import CAMERAS

VERSION = "v1.0-trainval"


@pytest.fixture
def world(tiny_world: Path, tmp_path: Path) -> Path:
    """A copy of the tiny world that a test may damage, without the files that are not needed."""
    root = tmp_path / "world"
    shutil.copytree(tiny_world, root, ignore=shutil.ignore_patterns("*.bin", "*.npz*", "LIDAR_TOP", "*_route.json", "*_meta.json"))
    return root


def edit(root: Path, table: str, change: Callable[[list[dict]], object]) -> None:
    path = root / VERSION / f"{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def images(root: Path, camera: str) -> list[Path]:
    return sorted((root / "samples" / camera).iterdir())


def test_a_dataset_of_images_tables_masks_and_can_poses_is_complete(world: Path) -> None:
    assert completeness.missing(world, VERSION) == []
    completeness.require(world, VERSION)


def test_one_report_names_tables_masks_can_signals_and_images(world: Path) -> None:
    mask = next((world / "maps").iterdir())
    pose = sorted((world / "can_bus").glob("*_pose.json"))[1]
    gone = [*images(world, "CAM_FRONT")[4:6], images(world, "CAM_BACK_LEFT")[5]]  # of the second scene
    for path in (world / VERSION / "log.json", world / VERSION / "category.json", mask, pose, *gone):
        path.unlink()
    with pytest.raises(DatasetError) as refused:
        load_or_build(DataConfig(root=str(world), workers=0))
    header, *lines, where = str(refused.value).split("\n  ")
    assert header == f"{world} is not complete for {VERSION}:"
    assert lines[:-1] == [
        f"{VERSION}: category.json, log.json missing; unpack v1.0-trainval_meta.tgz",
        f"maps: 1 of 1 masks missing, first maps/{mask.name}; unpack v1.0-trainval_meta.tgz",
        f"can_bus: 1 of 3 scenes missing, first {pose.name}; unpack can_bus.zip",
        f"samples/CAM_BACK_LEFT: 1 of 12 images missing, first {gone[2].name}",
        f"samples/CAM_FRONT: 2 of 12 images missing, first {gone[0].name}",
    ]
    scene = pose.name.removesuffix("_pose.json")
    assert lines[-1].startswith(f"images are missing in 1 of 3 scenes, {scene} to {scene}; unpack v1.0-trainval01_keyframes.tgz to ")
    assert "nuscenes.org/nuscenes#download" in where
    assert not build_infos.cache_path(world, VERSION).exists()


def test_all_images_of_a_missing_folder_are_counted(world: Path) -> None:
    first = images(world, "CAM_BACK")[0].name
    shutil.rmtree(world / "samples/CAM_BACK")
    lines = completeness.missing(world, VERSION)
    assert lines[0] == f"samples/CAM_BACK: 12 of 12 images missing, first {first}"
    assert lines[1].startswith("images are missing in 3 of 3 scenes, scene-0001 to scene-0012;")


def test_images_between_key_frames_and_other_sensors_are_not_required(world: Path) -> None:
    def sweep(rows: list[dict]) -> None:
        rows.append({**rows[0], "token": "sweep", "is_key_frame": False, "filename": "sweeps/CAM_FRONT/none.jpg"})

    edit(world, "sample_data", sweep)
    assert completeness.missing(world, VERSION) == []


def test_empty_camera_folders_are_reported_even_while_tables_are_missing(world: Path) -> None:
    (world / VERSION / "sample_data.json").unlink()
    shutil.rmtree(world / "can_bus")
    shutil.rmtree(world / "samples/CAM_BACK")
    (world / "samples/CAM_BACK").mkdir()
    shutil.rmtree(world / "samples/CAM_FRONT")
    table, can_bus, found = completeness.missing(world, VERSION)
    assert "sample_data.json missing" in table
    assert can_bus.endswith("unpack can_bus.zip")
    assert found.startswith("images: no images in samples/CAM_FRONT, samples/CAM_BACK; unpack v1.0-trainval01_keyframes.tgz")
    for camera in CAMERAS:
        (world / "samples" / camera).mkdir(exist_ok=True)
        (world / "samples" / camera / "some.jpg").touch()
    assert "each of the six camera folders has some; they can be counted once" in completeness.missing(world, VERSION)[-1]


@pytest.mark.parametrize("content", ["[{", "[]{}", '[{"token": 1}]', '["a"'])
def test_a_damaged_table_is_a_line_of_the_report(world: Path, content: str) -> None:
    (world / VERSION / "scene.json").write_text(content)
    (world / VERSION / "log.json").unlink()
    lines = completeness.missing(world, VERSION)
    assert lines[0].startswith(f"{VERSION}: log.json missing")
    assert lines[1].startswith(f"{VERSION}/scene.json: damaged (")
    assert lines[1].endswith("unpack v1.0-trainval_meta.tgz again")


def test_scenes_for_which_nuscenes_has_no_can_signals_are_not_reported(world: Path) -> None:
    edit(world, "scene", lambda rows: rows[0].update(name="scene-0161"))
    assert completeness.missing(world, VERSION) == []


@pytest.mark.parametrize(
    ("version", "metadata", "pictures"),
    [
        ("v1.0-mini", "v1.0-mini.tgz", "v1.0-mini.tgz"),
        ("v1.0-test", "v1.0-test_meta.tgz", "v1.0-test_blobs_camera.tgz"),
        ("mine", "the metadata of mine", "the images of mine"),
    ],
)
def test_each_version_names_its_own_archives(world: Path, version: str, metadata: str, pictures: str) -> None:
    (line, _) = completeness.missing(world, version)
    assert line == f"{version}: no such folder, there is {VERSION}; unpack {metadata}, or set data.version"
    (world / VERSION).rename(world / version)
    images(world, "CAM_FRONT")[0].unlink()
    assert f"; unpack {pictures}" in completeness.missing(world, version)[-1]


def test_a_dataset_folder_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"\Ano dataset at [^\n]*nowhere: no such folder; set data\.root [^\n]*\Z"):
        completeness.require(tmp_path / "nowhere", VERSION)


def test_the_report_on_an_empty_folder_lists_all_archives_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as refused:
        load_or_build(dataclasses.replace(DataConfig(root=str(tmp_path)), version="v1.0-mini"))
    for wanted in ("v1.0-mini.tgz", "can_bus.zip", *(f"samples/{camera}" for camera in CAMERAS)):
        assert wanted in str(refused.value)


def test_the_command_checks_first_and_ends_with_the_report(world: Path) -> None:
    load_or_build(DataConfig(root=str(world), workers=0))
    images(world, "CAM_FRONT")[0].unlink()  # after the infos were written
    with pytest.raises(SystemExit, match="^error: .* is not complete for v1.0-trainval:\n  samples/CAM_FRONT: 1 of 12"):
        build_infos.main(["--root", str(world)])
