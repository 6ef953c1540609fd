"""The synthetic world agrees with the nuScenes devkit: schema, geometry, annotations, lidar points, poses and metric."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from nuscenes.can_bus.can_bus_api import NuScenesCanBus
from nuscenes.eval.detection.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils import splits
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion

from qdbev.data.nuscenes.files import TABLES
from qdbev.data.rig import CHANNELS, make_sensor
from qdbev.schema import CAMERAS
from synthetic.classes import CLASSES
from synthetic.config import WorldConfig, micro
from synthetic.generate import generate
from synthetic.renderer import Renderer
from synthetic.scene_names import TRAIN_NAMES, VAL_NAMES
from synthetic.street import build_street
from synthetic.tables import KEY_FRAME_US, VERSION, scene_start_us, token

LIDAR_HEIGHT = 1.84
REQUIRED_FIELDS = {
    "category": {"token", "name", "description"},
    "attribute": {"token", "name", "description"},
    "visibility": {"token", "level", "description"},
    "instance": {"token", "category_token", "nbr_annotations", "first_annotation_token", "last_annotation_token"},
    "sensor": {"token", "channel", "modality"},
    "calibrated_sensor": {"token", "sensor_token", "translation", "rotation", "camera_intrinsic"},
    "ego_pose": {"token", "translation", "rotation", "timestamp"},
    "log": {"token", "logfile", "vehicle", "date_captured", "location"},
    "scene": {"token", "name", "description", "log_token", "nbr_samples", "first_sample_token", "last_sample_token"},
    "sample": {"token", "timestamp", "scene_token", "next", "prev"},
    "sample_data": {
        *("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "filename", "fileformat"),
        *("width", "height", "timestamp", "is_key_frame", "next", "prev"),
    },
    "sample_annotation": {
        *("token", "sample_token", "instance_token", "attribute_tokens", "visibility_token", "translation", "size"),
        *("rotation", "num_lidar_pts", "num_radar_pts", "next", "prev"),
    },
    "map": {"token", "log_tokens", "category", "filename"},
}


def tiny() -> WorldConfig:
    return dataclasses.replace(micro(), name="tiny", num_train=2, num_val=1, num_samples=4, lidar_stride=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    generate(tiny(), folder)
    return folder


@pytest.fixture(scope="module")
def nusc(root: Path) -> NuScenes:
    return NuScenes(VERSION, str(root), verbose=False)


@pytest.fixture(scope="module")
def scenes() -> dict[str, Renderer]:
    return {name: Renderer(build_street(tiny(), name)) for name in tiny().scene_names}


def test_the_unmodified_devkit_loads_the_world(nusc: NuScenes) -> None:
    assert [scene["name"] for scene in nusc.scene] == [*TRAIN_NAMES[:2], VAL_NAMES[0]]
    assert len(nusc.sample) == 12
    for sample in nusc.sample:
        assert set(sample["data"]) == set(CHANNELS)
        assert sample["timestamp"] == nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["timestamp"]


def test_every_sensor_file_exists_and_has_the_size_its_record_says(nusc: NuScenes) -> None:
    for record in nusc.sample_data:
        path = Path(nusc.dataroot) / record["filename"]
        if record["fileformat"] == "jpg":
            assert cv2.imread(str(path)).shape == (record["height"], record["width"], 3)
        else:
            points = np.fromfile(path, np.float32).reshape(-1, 5)
            assert len(points) > 500
            assert np.isfinite(points).all()


def test_the_thirteen_tables_have_the_fields_of_the_schema(root: Path) -> None:
    assert set(TABLES) == set(REQUIRED_FIELDS) == {path.stem for path in (root / VERSION).iterdir()}
    for table, fields in REQUIRED_FIELDS.items():
        records = json.loads((root / VERSION / f"{table}.json").read_text())
        assert records, table
        assert all(fields <= set(record) for record in records), table


def test_tokens_are_unique_and_references_exist(nusc: NuScenes) -> None:
    for table in TABLES:
        records = getattr(nusc, table)
        assert len({record["token"] for record in records}) == len(records), table
    for annotation in nusc.sample_annotation:
        nusc.get("sample", annotation["sample_token"])
        nusc.get("visibility", annotation["visibility_token"])
        assert len(annotation["attribute_tokens"]) <= 1
        assert annotation["num_radar_pts"] == 0


def test_every_class_has_an_object_with_lidar_points_in_every_scene(nusc: NuScenes) -> None:
    for scene in nusc.scene:
        valid = {
            category_to_detection_name(annotation["category_name"])
            for annotation in nusc.sample_annotation
            if annotation["num_lidar_pts"] > 0 and nusc.get("sample", annotation["sample_token"])["scene_token"] == scene["token"]
        }
        assert valid == set(CLASSES), scene["name"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_ground_truth_submitted_as_detections_scores_one(nusc: NuScenes, tmp_path: Path, split: str) -> None:
    results = {
        sample["token"]: [_as_prediction(nusc, annotation) for annotation in sample["anns"] if _is_valid(nusc, annotation)]
        for sample in nusc.sample
        if nusc.get("scene", sample["scene_token"])["name"] in getattr(splits, split)
    }
    path = tmp_path / "results.json"
    modalities = ("camera", "lidar", "radar", "map", "external")
    path.write_text(json.dumps({"meta": {f"use_{name}": False for name in modalities}, "results": results}))
    evaluation = DetectionEval(nusc, config_factory("detection_cvpr_2019"), str(path), split, str(tmp_path), verbose=False)
    metrics, _ = evaluation.evaluate()
    summary = metrics.serialize()
    assert summary["mean_ap"] == pytest.approx(1.0, abs=1e-9)
    assert summary["nd_score"] == pytest.approx(1.0, abs=1e-9)


def _is_valid(nusc: NuScenes, annotation_token: str) -> bool:
    annotation = nusc.get("sample_annotation", annotation_token)
    return annotation["num_lidar_pts"] + annotation["num_radar_pts"] > 0


def _as_prediction(nusc: NuScenes, annotation_token: str) -> dict:
    annotation = nusc.get("sample_annotation", annotation_token)
    attributes = [nusc.get("attribute", key)["name"] for key in annotation["attribute_tokens"]]
    return {
        "sample_token": annotation["sample_token"],
        "translation": annotation["translation"],
        "size": annotation["size"],
        "rotation": annotation["rotation"],
        "velocity": np.nan_to_num(nusc.box_velocity(annotation_token)[:2]).tolist(),
        "detection_name": category_to_detection_name(annotation["category_name"]),
        "detection_score": 1.0,
        "attribute_name": attributes[0] if attributes else "",
    }


def test_an_instance_is_annotated_without_gaps(nusc: NuScenes) -> None:
    for instance in nusc.instance:
        annotation = nusc.get("sample_annotation", instance["first_annotation_token"])
        count = 1
        while annotation["next"]:
            following = nusc.get("sample_annotation", annotation["next"])
            assert following["prev"] == annotation["token"]
            assert nusc.get("sample", annotation["sample_token"])["next"] == following["sample_token"]
            annotation, count = following, count + 1
        assert annotation["token"] == instance["last_annotation_token"]
        assert count == instance["nbr_annotations"]


def test_the_devkits_velocity_is_the_speed_an_object_moves_at(nusc: NuScenes, scenes: dict[str, Renderer]) -> None:
    name = VAL_NAMES[0]
    street = scenes[name].street
    checked = 0
    for index, actor in enumerate(street.actors):
        instance = token(0, "instance", name, index)
        for annotation in (a for a in nusc.sample_annotation if a["instance_token"] == instance):
            velocity = nusc.box_velocity(annotation["token"])
            if np.isfinite(velocity).all():
                assert np.linalg.norm(velocity) == pytest.approx(actor.speed, rel=0.02, abs=1e-6)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("channel", CAMERAS)
def test_boxes_projected_by_the_devkit_cover_the_pixels_of_their_object(nusc: NuScenes, scenes: dict[str, Renderer], channel: str) -> None:
    checked = 0
    for sample in nusc.sample:
        name = nusc.get("scene", sample["scene_token"])["name"]
        frame = (sample["timestamp"] - scene_start_us(name)) // KEY_FRAME_US
        checked += _check_boxes_on_pixels(nusc, sample["data"][channel], scenes[name], name, channel, frame)
    assert checked > 0


def _check_boxes_on_pixels(nusc: NuScenes, key: str, renderer: Renderer, name: str, channel: str, frame: int) -> int:
    """Render the image without each of the objects in turn: the pixels that change must be inside its projected box and fill part of it.

    Three kinds of objects are not checked: those that move, as the camera's image is taken before the lidar's sweep; those that are
    partly hidden; and those cut by the image's edge, of which only an empty corner of the box may be in the image.
    """
    image, _ = renderer.image(channel, frame)
    path, boxes, intrinsic = nusc.get_sample_data(key)
    assert np.abs(cv2.imread(path).astype(int) - image).mean() < 4  # JPEG only
    instances = {token(0, "instance", name, index): index for index in range(len(renderer.street.actors))}
    checked = 0
    for box in boxes:
        annotation = nusc.get("sample_annotation", box.token)
        index = instances[annotation["instance_token"]]
        inside = _box_mask(box.corners(), intrinsic, image.shape[:2])
        cut = inside[:, [0, -1]].any() or inside[[0, -1]].any()
        if renderer.street.actors[index].speed > 0 or annotation["visibility_token"] != "4" or cut or inside.sum() < 40:
            continue
        without, _ = renderer.image(channel, frame, skip=(index,))
        changed = np.abs(image.astype(int) - without).max(-1) > 10
        assert changed.sum() > 0.3 * inside.sum(), annotation["category_name"]
        outside = changed & (cv2.dilate(inside, np.ones((3, 3), np.uint8)) == 0)
        assert outside.sum() <= 0.01 * inside.sum(), annotation["category_name"]  # a smoothed edge reaches two pixels here and there
        checked += 1
    return checked


def _box_mask(corners: np.ndarray, intrinsic: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 mask of the convex hull of corners (3, 8) in the camera frame; all zero if a corner is behind the camera."""
    mask = np.zeros(image_hw, np.uint8)
    if corners[2].min() > 0.3:
        pixels = (intrinsic @ corners)[:2] / corners[2]
        cv2.fillConvexPoly(mask, cv2.convexHull(np.round(pixels.T).astype(np.int32)), 1)
    return mask


def test_annotations_have_the_number_of_lidar_points_that_the_devkit_finds_in_their_box(nusc: NuScenes) -> None:
    checked = 0
    for sample in nusc.sample[::4]:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = LidarPointCloud.from_file(path).points[:3]
        for box in boxes:
            expected = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            box.wlh = box.wlh + 0.12  # four sigma of the range noise on each side
            found = int(points_in_box(box, points[:, points[2] > 0.06 - LIDAR_HEIGHT]).sum())
            assert abs(found - expected) <= 4 + 0.1 * expected  # some are as low as the ground
            checked += expected > 20
    assert checked > 15


def test_each_camera_has_its_own_time_and_ego_pose(nusc: NuScenes, scenes: dict[str, Renderer]) -> None:
    sample = nusc.sample[0]
    lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    at_lidar = nusc.get("ego_pose", lidar["ego_pose_token"])
    speed = scenes[TRAIN_NAMES[0]].street.ego.speed
    for channel in CAMERAS:
        record = nusc.get("sample_data", sample["data"][channel])
        pose = nusc.get("ego_pose", record["ego_pose_token"])
        seconds = (lidar["timestamp"] - record["timestamp"]) / 1e6
        assert 0 < seconds < 0.05
        assert pose["translation"][2] == 0
        travelled = np.linalg.norm(np.subtract(at_lidar["translation"], pose["translation"]))
        assert travelled == pytest.approx(speed * seconds, rel=0.02)


def test_the_can_bus_reader_finds_a_pose_around_each_sample(root: Path, nusc: NuScenes) -> None:
    reader = NuScenesCanBus(str(root))
    for sample in nusc.sample:
        poses = reader.get_messages(nusc.get("scene", sample["scene_token"])["name"], "pose")
        assert list(poses[0]) == ["accel", "orientation", "pos", "rotation_rate", "utime", "vel"]
        times = np.array([pose["utime"] for pose in poses])
        assert times[0] < sample["timestamp"] < times[-1]
        assert np.diff(times).max() <= 20_001
        nearest = poses[int(np.abs(times - sample["timestamp"]).argmin())]
        lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        truth = nusc.get("ego_pose", lidar["ego_pose_token"])
        np.testing.assert_allclose(nearest["pos"], truth["translation"], atol=0.1)
        np.testing.assert_allclose(nearest["orientation"], truth["rotation"], atol=1e-3)


@pytest.mark.parametrize("channel", CHANNELS)
def test_the_calibrated_rotation_of_a_sensor_is_that_of_the_rig(nusc: NuScenes, channel: str) -> None:
    record = nusc.get("sample_data", nusc.sample[0]["data"][channel])
    rotation = Quaternion(nusc.get("calibrated_sensor", record["calibrated_sensor_token"])["rotation"])
    np.testing.assert_allclose(rotation.rotation_matrix, make_sensor(channel, 320).ego_from_sensor, atol=1e-12)


def test_scene_names_come_from_the_official_splits_and_are_readable_on_the_can_bus() -> None:
    assert set(TRAIN_NAMES) <= set(splits.train)
    assert set(VAL_NAMES) <= set(splits.val)
    refused = {*range(161, 177), *range(309, 315)}
    assert not refused & {int(name[-4:]) for name in TRAIN_NAMES + VAL_NAMES}
