"""Infos of nuScenes-format datasets agree with the devkit and are cached while the tables are unchanged; errors say what is wrong."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.geometry_utils import view_points
from pyquaternion import Quaternion

from qdbev import artifact
from qdbev.can_bus import absolute_can_bus
from qdbev.data import build_infos
from qdbev.data.build_infos import load_or_build
from qdbev.data.config import DataConfig
from qdbev.data.infos import DatasetError, Infos
from qdbev.data.nuscenes import tables
from qdbev.schema import CAMERAS, CLASSES

VERSION = "v1.0-trainval"


@pytest.fixture(scope="module")
def devkit(tiny_world: Path) -> NuScenes:
    return NuScenes(VERSION, str(tiny_world), verbose=False)


@pytest.fixture(scope="module")
def known(tiny_world: Path) -> Infos:
    return load_or_build(DataConfig(root=str(tiny_world), workers=0))


@pytest.fixture
def world(tiny_world: Path, tmp_path: Path) -> Path:
    """A copy of the tiny world whose tables and CAN files a test may change."""
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


def test_lidar2img_agrees_with_the_devkit_on_every_box(devkit: NuScenes, known: Infos) -> None:
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


def test_boxes_are_the_devkits_in_the_lidar_frame_with_second_yaw(devkit: NuScenes, known: Infos) -> None:
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


def test_the_poses_lead_boxes_back_to_their_annotations(devkit: NuScenes, known: Infos) -> None:
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
    found = load_or_build(config(world))
    info = next(found[i] for i in range(len(found)) if found[i].token == first)
    assert len(info.boxes) == len(info.labels) == len(info.num_points) == len(own) - 1
    assert (info.boxes[:, 7:] == 0).all()


def test_samples_are_in_order_of_time_with_those_of_a_scene_together(known: Infos) -> None:
    assert (np.diff(known.timestamp_us) > 0).all()
    assert known.split("train").tolist() + known.split("val").tolist() == list(range(len(known))) == list(range(12))
    assert (known.scene_token[1:] != known.scene_token[:-1]).sum() == 2  # three scenes, none of them interrupted


def test_the_arrays_have_the_documented_shapes_and_types(known: Infos) -> None:
    samples, cameras, boxes, splits = 12, 6, len(known.boxes), len(known.split_names)
    expected = {
        "token": ("S", samples),
        "scene_token": ("S", samples),
        "timestamp_us": (np.int64, samples),
        "image_files": ("S", samples, cameras),
        "image_hw": (np.int64, 2),
        "lidar2img": (np.float64, samples, cameras, 4, 4),
        "ego_from_lidar": (np.float64, samples, 4, 4),
        "global_from_ego": (np.float64, samples, 4, 4),
        "quaternion": (np.float64, samples, 4),
        "can_bus": (np.float64, samples, 18),
        "box_start": (np.int64, samples + 1),
        "boxes": (np.float32, boxes, 9),
        "labels": (np.int64, boxes),
        "num_points": (np.int64, boxes),
        "split_names": ("S", splits),
        "in_split": (bool, splits, samples),
    }
    assert expected.keys() == {field.name for field in dataclasses.fields(Infos)}
    for name, (kind, *shape) in expected.items():
        array = getattr(known, name)
        assert list(array.shape) == shape, name
        assert array.dtype.kind == kind if kind == "S" else array.dtype == kind, name


def test_can_bus_equals_that_of_the_official_code_with_its_error(golden_modules: dict[str, np.ndarray]) -> None:
    for frame, rotation in enumerate(golden_modules["info_quats"]):
        translation = np.array([601.25 + 3.65 * frame, 1640.5 + 3.1 * frame, 0.3])
        vector = absolute_can_bus(np.arange(7, 16) * 0.25, rotation, translation)
        np.testing.assert_allclose(vector, golden_modules["info_can_bus"][frame], atol=1e-11)  # degrees of float64


def test_can_signals_are_from_the_message_after_the_sample_and_the_pose_from_the_lidar(world: Path, devkit: NuScenes, known: Infos) -> None:
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
    edit(world, "scene", lambda rows: rows[1].update(name="scene-0161"))  # one of the scenes without CAN data, by the devkit's list
    found = load_or_build(config(world))
    silent = {found[i].scene_token for i in range(len(found)) if not found[i].can_bus[7:16].any()}
    assert silent == {scenes[0]["token"], scenes[1]["token"]}
    assert build_infos.summary(found)["samples_without_can_signals"] == 8
    assert (found.can_bus[:, :2] != 0).all()


def test_records_between_key_frames_change_nothing_and_are_dropped(world: Path, known: Infos) -> None:
    def between(**changes: object) -> Callable[[list[dict]], None]:
        return lambda rows: rows.extend([{**row, **changes, "token": f"between-{row['token']}"} for row in rows])

    edit(world, "sample_data", between(is_key_frame=False, ego_pose_token="between", filename="sweeps/none.jpg"))
    edit(world, "ego_pose", between(translation=[0.0, 0.0, 0.0]))
    found = tables.read(world, VERSION, workers=0)
    for field in dataclasses.fields(Infos):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(known, field.name))
    nuscenes = tables._open(world, VERSION)
    assert len(nuscenes.sample_data) == len(nuscenes.ego_pose) == 7 * len(known)


def test_worker_processes_read_the_same(world: Path, known: Infos) -> None:
    parallel = tables.read(world, VERSION, workers=2)
    for field in dataclasses.fields(Infos):
        np.testing.assert_array_equal(getattr(parallel, field.name), getattr(known, field.name))


def written(world: Path) -> tuple[int, int]:
    """Identity of the cached file: it changes whenever the file is written, as a new file then replaces the old one."""
    status = build_infos.cache_path(world, VERSION).stat()
    return status.st_ino, status.st_mtime_ns


def test_infos_are_cached_and_read_back_unchanged(world: Path, known: Infos) -> None:
    load_or_build(config(world))
    before = written(world)
    again = load_or_build(config(world))
    assert written(world) == before
    for field in dataclasses.fields(Infos):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(known, field.name))


def relabel_layout(world: Path, layout: int, **more: np.ndarray) -> None:
    """Rewrite the cached file as an older version of this project would have written it: with other arrays besides, and its layout."""
    path = build_infos.cache_path(world, VERSION)
    seal = artifact.unseal(path, "infos")
    with np.load(path) as arrays:
        content = dict(arrays)
    np.savez(path, **content, **more)
    artifact.seal(path, config={**seal.config, "layout": layout}, parent=None, facts=seal.facts)


def test_a_cached_file_of_the_layout_with_neighbours_still_opens(world: Path, known: Infos) -> None:
    load_or_build(config(world))
    relabel_layout(world, 2, prev=np.array([b""] * 12), next=np.array([b""] * 12))
    before = written(world)
    again = load_or_build(config(world))
    assert written(world) == before
    for field in dataclasses.fields(Infos):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(known, field.name))


@pytest.mark.parametrize("layout", [1, 99])
def test_a_cached_file_of_an_unknown_layout_is_built_again(world: Path, layout: int) -> None:
    load_or_build(config(world))
    relabel_layout(world, layout)
    before = written(world)
    load_or_build(config(world))
    assert written(world) != before
    assert artifact.unseal(build_infos.cache_path(world, VERSION), "infos").config["layout"] == 3


def test_infos_are_built_again_when_a_table_changed_or_the_file_is_damaged(world: Path) -> None:
    before = load_or_build(config(world))
    edit(world, "sample_annotation", lambda rows: [row.update(num_lidar_pts=7, num_radar_pts=0) for row in rows])
    changed = load_or_build(config(world))
    assert (changed.num_points == 7).all()
    assert not (before.num_points == 7).all()
    path = build_infos.cache_path(world, VERSION)
    path.write_bytes(path.read_bytes()[:-100])
    assert (load_or_build(config(world)).num_points == 7).all()


def test_a_split_of_the_users_own_can_be_used_and_an_unknown_split_is_refused_with_the_known_ones(world: Path) -> None:
    scene = json.loads((world / VERSION / "scene.json").read_text())[1]
    (world / VERSION / "splits.json").write_text(json.dumps({"mine": [scene["name"]]}))
    found = load_or_build(config(world))
    assert {found[i].scene_token for i in found.split("mine")} == {scene["token"]}
    with pytest.raises(DatasetError, match="no split 'mini_val'.*train, val, .*mine|no split 'mini_val'.*mine, train, val"):
        found.split("mini_val")


def test_a_version_without_annotations_has_samples_without_boxes(world: Path) -> None:
    for table in ("sample_annotation", "instance"):
        edit(world, table, list.clear)
    (world / VERSION).rename(world / "v1.0-test")
    (world / "v1.0-test" / "splits.json").write_text(json.dumps({"own": ["scene-0001"]}))
    found = load_or_build(config(world, version="v1.0-test"))
    assert len(found) == 12
    assert found.boxes.shape == (0, 9)
    assert found[11].labels.shape == (0,)


def test_tables_that_contradict_each_other_are_refused(world: Path) -> None:
    def refuses(message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            load_or_build(config(world))

    whole = (world / VERSION / "ego_pose.json").read_text()
    (world / VERSION / "ego_pose.json").write_text(whole[:-50])
    refuses("cannot be read")
    (world / VERSION / "ego_pose.json").write_text(whole)
    edit(world, "sample_data", lambda rows: rows.remove(next(row for row in rows if "CAM_BACK/" in row["filename"])))
    refuses("has no key frame of CAM_BACK;")
    edit(world, "scene", list.clear)
    refuses("has no samples")


def test_a_dataset_that_lost_a_table_is_refused_although_its_infos_are_cached(world: Path) -> None:
    load_or_build(config(world))
    (world / VERSION / "log.json").unlink()
    with pytest.raises(DatasetError, match=r"log\.json missing"):
        load_or_build(config(world))


def test_images_of_different_sizes_are_refused(world: Path) -> None:
    edit(world, "sample_data", lambda rows: next(row for row in rows if "CAM_BACK/" in row["filename"]).update(width=99))
    with pytest.raises(DatasetError, match="differ in size"):
        load_or_build(config(world))


def test_the_command_prints_a_summary_or_one_line_with_the_error(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_infos.main(["--root", str(world), "--workers", "0"])
    assert "samples: 12" in capsys.readouterr().out
    (world / VERSION / "sample.json").write_text("[]")
    with pytest.raises(SystemExit, match="^error: the tables in .* cannot be read"):
        build_infos.main(["--root", str(world), "--workers", "0"])
