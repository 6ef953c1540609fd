"""The infos say what the devkit says, are kept as long as they are true, and name what is missing."""

import dataclasses
import json
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.geometry_utils import view_points
from pyquaternion import Quaternion

from qdbev.data import infos, tables
from qdbev.data.config import DataConfig
from qdbev.schema import CAMERAS, CLASSES

VERSION = "v1.0-trainval"


@pytest.fixture(scope="module")
def devkit(tiny_world: Path) -> NuScenes:
    return NuScenes(VERSION, str(tiny_world), verbose=False)


@pytest.fixture(scope="module")
def known(tiny_world: Path) -> infos.Infos:
    return infos.load_or_build(DataConfig(root=str(tiny_world), workers=0))


@pytest.fixture
def world(tiny_world: Path, tmp_path: Path) -> Path:
    """The tiny world with tables and CAN files of its own, free to be changed."""
    root = tmp_path / "world"
    shutil.copytree(tiny_world / VERSION, root / VERSION)
    shutil.copytree(tiny_world / "can_bus", root / "can_bus")
    for folder in ("samples", "maps"):
        (root / folder).symlink_to(tiny_world / folder)
    return root


def config(root: Path, **changes: object) -> DataConfig:
    return dataclasses.replace(DataConfig(root=str(root), workers=0), **changes)


def edit(root: Path, table: str, change: Callable[[list[dict]], object]) -> None:
    path = root / VERSION / f"{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def test_lidar2img_agrees_with_the_devkit_on_every_box(devkit: NuScenes, known: infos.Infos) -> None:
    compared = 0
    for index in range(len(known)):
        info = known[index]
        data = devkit.get("sample", info.token)["data"]
        in_lidar = {box.token: box.center for box in devkit.get_sample_data(data["LIDAR_TOP"])[1]}
        for camera, matrix, file in zip(CAMERAS, info.lidar2img, info.image_files, strict=True):
            path, boxes, intrinsic = devkit.get_sample_data(data[camera])
            assert Path(path) == Path(devkit.dataroot) / file
            for box in boxes:
                if box.center[2] > 1:
                    pixel = view_points(box.center[:, None], intrinsic, normalize=True)[:2, 0]
                    projected = matrix @ [*in_lidar[box.token], 1.0]
                    np.testing.assert_allclose(projected[:2] / projected[2], pixel, atol=1e-6)  # rounding of float64
                    compared += 1
    assert compared > 50


def test_boxes_are_the_devkits_in_the_lidar_frame_with_second_yaw(devkit: NuScenes, known: infos.Infos) -> None:
    for index in range(len(known)):
        info = known[index]
        sample = devkit.get("sample", info.token)
        _, expected, _ = devkit.get_sample_data(sample["data"]["LIDAR_TOP"])
        lidar_from_global = np.linalg.inv(info.global_from_ego @ info.ego_from_lidar)[:3, :3]
        assert len(info.boxes) == len(expected) > 0
        for box, label, points, annotation, other in zip(info.boxes, info.labels, info.num_points, sample["anns"], expected, strict=True):
            record = devkit.get("sample_annotation", annotation)
            velocity = lidar_from_global @ [*devkit.box_velocity(annotation)[:2], 0.0]
            yaw = -other.orientation.yaw_pitch_roll[0] - np.pi / 2
            np.testing.assert_allclose(box, [*other.center, *other.wlh, yaw, *np.nan_to_num(velocity[:2])], atol=2e-5)  # float32
            assert CLASSES[label] == category_to_detection_name(record["category_name"])
            assert points == record["num_lidar_pts"] + record["num_radar_pts"]


def test_the_poses_lead_boxes_back_to_their_annotations(devkit: NuScenes, known: infos.Infos) -> None:
    info = known[5]
    global_from_lidar = info.global_from_ego @ info.ego_from_lidar
    for box, token in zip(info.boxes, devkit.get("sample", info.token)["anns"], strict=True):
        record = devkit.get("sample_annotation", token)
        yaw = -box[6] - np.pi / 2
        heading = global_from_lidar[:3, :3] @ [np.cos(yaw), np.sin(yaw), 0.0]
        np.testing.assert_allclose((global_from_lidar @ [*box[:3], 1.0])[:3], record["translation"], atol=1e-4)  # float32 boxes
        np.testing.assert_allclose(heading, Quaternion(record["rotation"]).rotate([1.0, 0.0, 0.0]), atol=1e-5)


def test_boxes_of_other_classes_are_left_out_and_unknown_velocity_is_zero(world: Path) -> None:
    records = json.loads((world / VERSION / "sample_annotation.json").read_text())
    first = records[0]["sample_token"]
    own = [record["token"] for record in records if record["sample_token"] == first]
    edit(world, "sample_annotation", lambda rows: [row.update(prev="", next="") for row in rows if row["sample_token"] == first])
    animal = next(row["token"] for row in json.loads((world / VERSION / "category.json").read_text()) if row["name"] == "animal")
    edit(world, "instance", lambda rows: next(r for r in rows if r["token"] == records[0]["instance_token"]).update(category_token=animal))
    found = infos.load_or_build(config(world))
    info = next(found[i] for i in range(len(found)) if found[i].token == first)
    assert len(info.boxes) == len(info.labels) == len(info.num_points) == len(own) - 1
    assert (info.boxes[:, 7:] == 0).all()


def test_samples_come_in_order_of_time_and_know_their_neighbours(known: infos.Infos) -> None:
    assert (np.diff(known.timestamp_us) > 0).all()
    assert known.split("train").tolist() + known.split("val").tolist() == list(range(len(known))) == list(range(12))
    for index in range(1, len(known)):
        before, info = known[index - 1], known[index]
        same = before.scene_token == info.scene_token
        assert (info.prev, before.next) == ((before.token, info.token) if same else ("", ""))


def test_can_bus_has_the_quirks_of_the_official_code(golden_modules: dict[str, np.ndarray]) -> None:
    for frame, rotation in enumerate(golden_modules["info_quats"]):
        translation = np.array([601.25 + 3.65 * frame, 1640.5 + 3.1 * frame, 0.3])
        vector = tables.can_bus(np.arange(7, 16) * 0.25, rotation, translation)
        np.testing.assert_allclose(vector, golden_modules["info_can_bus"][frame], atol=1e-11)  # degrees of float64


def test_can_signals_are_those_after_the_sample_and_the_pose_is_the_lidars(world: Path, devkit: NuScenes, known: infos.Infos) -> None:
    info = known[2]
    sample = devkit.get("sample", info.token)
    scene = devkit.get("scene", info.scene_token)["name"]
    messages = json.loads((world / "can_bus" / f"{scene}_pose.json").read_text())
    after = next(message for message in messages if message["utime"] > sample["timestamp"])
    pose = devkit.get("ego_pose", devkit.get("sample_data", sample["data"]["LIDAR_TOP"])["ego_pose_token"])
    np.testing.assert_array_equal(info.can_bus[7:16], [*after["accel"], *after["rotation_rate"], *after["vel"]])
    np.testing.assert_allclose(info.can_bus[:7], [*pose["translation"], *[pose["rotation"][0]] * 4])
    assert any(info.can_bus[7:16])


def test_scenes_without_can_signals_get_zeros(world: Path) -> None:
    scenes = json.loads((world / VERSION / "scene.json").read_text())
    (world / "can_bus" / f"{scenes[0]['name']}_pose.json").write_text("[]")
    (world / "can_bus" / f"{scenes[1]['name']}_pose.json").unlink()
    edit(world, "scene", lambda rows: rows[1].update(name="scene-0161"))  # one of the devkit's list without CAN data
    found = infos.load_or_build(config(world))
    silent = {found[i].scene_token for i in range(len(found)) if not found[i].can_bus[7:16].any()}
    assert silent == {scenes[0]["token"], scenes[1]["token"]}
    assert infos.summary(found)["samples_without_can_signals"] == 8
    assert (found.can_bus[:, :2] != 0).all()


def test_what_lies_between_key_frames_changes_nothing_and_is_not_kept(world: Path, known: infos.Infos) -> None:
    def between(**changes: object) -> Callable[[list[dict]], None]:
        return lambda rows: rows.extend([{**row, **changes, "token": f"between-{row['token']}"} for row in rows])

    edit(world, "sample_data", between(is_key_frame=False, ego_pose_token="between", filename="sweeps/none.jpg"))
    edit(world, "ego_pose", between(translation=[0.0, 0.0, 0.0]))
    found = tables.read(world, VERSION, workers=0)
    for field in dataclasses.fields(infos.Infos):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(known, field.name))
    nuscenes = tables._open(world, VERSION)
    assert len(nuscenes.sample_data) == len(nuscenes.ego_pose) == 7 * len(known)


def test_worker_processes_read_the_same(world: Path, known: infos.Infos) -> None:
    parallel = tables.read(world, VERSION, workers=2)
    for field in dataclasses.fields(infos.Infos):
        np.testing.assert_array_equal(getattr(parallel, field.name), getattr(known, field.name))


def test_infos_are_kept_and_read_back_unchanged(world: Path, known: infos.Infos, monkeypatch: pytest.MonkeyPatch) -> None:
    infos.load_or_build(config(world))
    monkeypatch.setattr(tables, "read", lambda *_: pytest.fail("the tables were read again"))
    again = infos.load_or_build(config(world))
    for field in dataclasses.fields(infos.Infos):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(known, field.name))


def test_infos_are_made_again_when_a_table_changed_or_the_file_is_damaged(world: Path) -> None:
    before = infos.load_or_build(config(world))
    edit(world, "sample_annotation", lambda rows: [row.update(num_lidar_pts=7, num_radar_pts=0) for row in rows])
    changed = infos.load_or_build(config(world))
    assert (changed.num_points == 7).all()
    assert not (before.num_points == 7).all()
    path = infos.cache_path(world, VERSION)
    path.write_bytes(path.read_bytes()[:-100])
    assert (infos.load_or_build(config(world)).num_points == 7).all()


def test_own_splits_are_known_and_unknown_ones_are_refused_with_a_list(world: Path) -> None:
    scene = json.loads((world / VERSION / "scene.json").read_text())[1]
    (world / VERSION / "splits.json").write_text(json.dumps({"mine": [scene["name"]]}))
    found = infos.load_or_build(config(world))
    assert {found[i].scene_token for i in found.split("mine")} == {scene["token"]}
    with pytest.raises(infos.DatasetError, match="no split 'mini_val'.*train, val, .*mine|no split 'mini_val'.*mine, train, val"):
        found.split("mini_val")


def test_a_version_without_annotations_has_samples_without_boxes(world: Path) -> None:
    for table in ("sample_annotation", "instance"):
        edit(world, table, list.clear)
    (world / VERSION).rename(world / "v1.0-test")
    (world / "v1.0-test" / "splits.json").write_text(json.dumps({"own": ["scene-0001"]}))
    found = infos.load_or_build(config(world, version="v1.0-test"))
    assert len(found) == 12
    assert found.boxes.shape == (0, 9)
    assert found[11].labels.shape == (0,)


def test_tables_that_contradict_each_other_are_refused(world: Path) -> None:
    def refuses(message: str) -> None:
        with pytest.raises(infos.DatasetError, match=message):
            infos.load_or_build(config(world))

    whole = (world / VERSION / "ego_pose.json").read_text()
    (world / VERSION / "ego_pose.json").write_text(whole[:-50])
    refuses("cannot be read")
    (world / VERSION / "ego_pose.json").write_text(whole)
    edit(world, "sample_data", lambda rows: rows.remove(next(row for row in rows if "CAM_BACK/" in row["filename"])))
    refuses("has no key frame of CAM_BACK;")
    edit(world, "scene", list.clear)
    refuses("has no samples")


def test_a_dataset_that_lost_a_table_is_refused_though_its_infos_are_kept(world: Path) -> None:
    infos.load_or_build(config(world))
    (world / VERSION / "log.json").unlink()
    with pytest.raises(infos.DatasetError, match=r"log\.json missing"):
        infos.load_or_build(config(world))


def test_images_of_different_sizes_are_refused(world: Path) -> None:
    edit(world, "sample_data", lambda rows: next(row for row in rows if "CAM_BACK/" in row["filename"]).update(width=99))
    with pytest.raises(infos.DatasetError, match="differ in size"):
        infos.load_or_build(config(world))


def test_the_command_prints_a_summary_or_one_clear_error(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(root: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["infos", "--root", str(root), "--workers", "0"])
        with warnings.catch_warnings(action="ignore"):  # runpy's, that the module is loaded already
            runpy.run_module("qdbev.data.infos", run_name="__main__")

    run(world)
    assert "samples: 12" in capsys.readouterr().out
    (world / VERSION / "sample.json").write_text("[]")
    with pytest.raises(SystemExit, match="^error: the tables in .* cannot be read"):
        run(world)
