"""nuScenes' tables, read through the devkit, become `Infos`.

Numbers follow BEVFormer 66b65f3 (tools/data_converter/nuscenes_converter.py) and mmdet3d 0.17.1: boxes in the SECOND convention,
velocity from neighbouring annotations, the ego motion between the shutters of camera and lidar inside `lidar2img`.
"""

import gc
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.splits import create_splits_scenes
from tqdm import tqdm

from qdbev import can_bus as layout
from qdbev import geometry
from qdbev.data.completeness import scenes_without_can_signals
from qdbev.data.infos import DatasetError, Infos
from qdbev.schema import CAMERAS, CLASSES

_LIDAR = "LIDAR_TOP"
_OFFICIAL_SPLITS = {
    "trainval": ("train", "val", "train_detect", "train_track"),
    "mini": ("mini_train", "mini_val"),
    "test": ("test",),
}
"""By the ending of the version's name, as the official evaluation demands."""

Row = dict[str, Any]


def read(root: Path, version: str, workers: int) -> Infos:
    """All samples of `root/version`, scenes shared out over `workers` processes (0: read in this one).

    Raises:
        DatasetError: Tables or CAN signals are damaged or contradict each other, or cameras differ in image size.
    """
    with tqdm(desc=f"reading {version}", unit="scene", disable=None) as bar:
        reader = SceneReader(root, _open(root, version))
        bar.reset(total=len(reader.nuscenes.scene))
        rows = []
        for scene_rows in _over_scenes(reader, workers):
            rows += scene_rows
            bar.update()
    if not rows:
        raise DatasetError(f"{root / version} has no samples")
    rows.sort(key=lambda row: row["timestamp_us"])
    return _stack(rows, _splits(root, version))


def can_bus(signals: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """(18,) absolute can_bus as the published checkpoints know it.

    Args:
        signals: (9,) acceleration (m/s^2), rotation rate (rad/s), velocity (m/s), each x, y, z.
        rotation: (4,) unit quaternion (w, x, y, z) of the ego in the global frame.
        translation: (3,) metres, global frame.

    Returns:
        [0:3] position; [3:7] the quaternion's w, four times; [7:16] signals; [16] yaw in [0, 2 pi); [17] the same in degrees.
    """
    heading = rotation_matrix(rotation)[:, 0]
    yaw_deg = np.rad2deg(np.arctan2(heading[1], heading[0]))
    if yaw_deg < 0:
        yaw_deg += 360
    vector = np.empty(18)
    vector[layout.POSITION] = translation
    vector[layout.ROTATION] = rotation[0]
    vector[7:16] = signals
    vector[layout.YAW_RAD] = np.deg2rad(yaw_deg)
    vector[layout.YAW_DEG] = yaw_deg
    return vector


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """(..., 3, 3) rotations from (..., 4) quaternions (w, x, y, z), which need not be of unit length."""
    q = np.asarray(quaternion, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)


class SceneReader:
    """Reads one scene at a time; G boxes of a sample, N cameras."""

    def __init__(self, root: Path, nuscenes: NuScenes) -> None:
        self.nuscenes = nuscenes
        self._can_folder = root / "can_bus"
        self._without_can = scenes_without_can_signals(root)

    def read(self, scene: Row) -> list[Row]:
        """One row per sample with the fields of `Infos`, plus the scene's name."""
        times, signals = self._can_signals(scene["name"])
        rows, token = [], scene["first_sample_token"]
        while token:
            sample = self.nuscenes.get("sample", token)
            after = np.searchsorted(times, sample["timestamp"], side="right").clip(max=len(times) - 1)
            rows.append({"scene_name": scene["name"], **self._row(sample, signals[after])})
            token = sample["next"]
        return rows

    def _can_signals(self, scene_name: str) -> tuple[np.ndarray, np.ndarray]:
        """(M,) microseconds and (M, 9) signals of the scene's pose messages; one message of zeros where nuScenes has none.

        Upstream takes the signals from the message after the sample and nothing else from it.
        """
        if scene_name in self._without_can:
            return np.zeros(1), np.zeros((1, 9))
        path = self._can_folder / f"{scene_name}_pose.json"
        try:
            messages = json.loads(path.read_text())
            times = np.array([message["utime"] for message in messages])
            signals = np.array([[*m["accel"], *m["rotation_rate"], *m["vel"]] for m in messages]).reshape(len(times), 9)
        except (ValueError, KeyError) as error:
            raise DatasetError(f"{path} is damaged ({error!r}); unpack the CAN bus expansion again") from error
        return (times, signals) if len(times) else (np.zeros(1), np.zeros((1, 9)))

    def _row(self, sample: Row, signals: np.ndarray) -> Row:
        absent = [channel for channel in (_LIDAR, *CAMERAS) if channel not in sample["data"]]
        if absent:
            raise DatasetError(f"sample {sample['token']} has no key frame of {', '.join(absent)}; the tables are incomplete")
        _, ego_from_lidar, ego_pose = self._sensor(sample, _LIDAR)
        global_from_ego = _pose(ego_pose)
        lidar_from_global = geometry.inverse(global_from_ego @ ego_from_lidar)
        cameras = [self._camera(sample, camera, lidar_from_global) for camera in CAMERAS]
        return {
            "token": sample["token"],
            "scene_token": sample["scene_token"],
            "prev": sample["prev"],
            "next": sample["next"],
            "timestamp_us": sample["timestamp"],
            "image_files": [image["filename"] for image, _ in cameras],
            "image_hw": [(image["height"], image["width"]) for image, _ in cameras],
            "lidar2img": np.stack([matrix for _, matrix in cameras]),
            "ego_from_lidar": ego_from_lidar,
            "global_from_ego": global_from_ego,
            "quaternion": np.array(ego_pose["rotation"]),
            "can_bus": can_bus(signals, np.array(ego_pose["rotation"]), np.array(ego_pose["translation"])),
            **self._boxes(sample, lidar_from_global),
        }

    def _sensor(self, sample: Row, channel: str) -> tuple[Row, np.ndarray, Row]:
        """The sample_data record, (4, 4) ego_from_sensor, and the ego_pose record at the sensor's own time."""
        data = self.nuscenes.get("sample_data", sample["data"][channel])
        calibration = self.nuscenes.get("calibrated_sensor", data["calibrated_sensor_token"])
        return data, _pose(calibration), self.nuscenes.get("ego_pose", data["ego_pose_token"])

    def _camera(self, sample: Row, channel: str, lidar_from_global: np.ndarray) -> tuple[Row, np.ndarray]:
        """The sample_data record and (4, 4) lidar2img."""
        image, ego_from_cam, ego_pose = self._sensor(sample, channel)
        cam_from_lidar = geometry.inverse(lidar_from_global @ _pose(ego_pose) @ ego_from_cam)
        intrinsic = self.nuscenes.get("calibrated_sensor", image["calibrated_sensor_token"])["camera_intrinsic"]
        img_from_cam = geometry.rigid(np.array(intrinsic), np.zeros(3))
        return image, img_from_cam @ cam_from_lidar

    def _boxes(self, sample: Row, lidar_from_global: np.ndarray) -> Row:
        """boxes (G, 9), labels (G,), num_points (G,) of the ten classes."""
        found = [self.nuscenes.get("sample_annotation", token) for token in sample["anns"]]
        names = [category_to_detection_name(annotation["category_name"]) for annotation in found]
        kept = [(annotation, name) for annotation, name in zip(found, names, strict=True) if name in CLASSES]
        boxes = np.zeros((len(kept), 9))
        if kept:
            annotations = [annotation for annotation, _ in kept]
            rotation = lidar_from_global[:3, :3]
            centers = np.array([a["translation"] for a in annotations])
            turned = rotation @ rotation_matrix(np.array([a["rotation"] for a in annotations]))  # (G, 3, 3)
            velocity = np.array([self.nuscenes.box_velocity(a["token"]) for a in annotations])
            velocity[:, 2] = 0  # upstream turns the horizontal part only
            boxes[:, :3] = centers @ rotation.T + lidar_from_global[:3, 3]
            boxes[:, 3:6] = [a["size"] for a in annotations]
            boxes[:, 6] = -np.arctan2(-turned[:, 0, 1], turned[:, 0, 0]) - np.pi / 2
            boxes[:, 7:] = np.nan_to_num(velocity @ rotation.T, nan=0.0)[:, :2]
        return {
            "boxes": boxes,
            "labels": [CLASSES.index(name) for _, name in kept],
            "num_points": [annotation["num_lidar_pts"] + annotation["num_radar_pts"] for annotation, _ in kept],
        }


class _KeyFrames(NuScenes):
    """The devkit's tables without what lies between key frames, which is nine tenths of nuScenes' sensor files and poses."""

    def __load_table__(self, table_name: str) -> list[Row]:
        if table_name == "ego_pose":  # comes before sample_data, which tells whose poses are needed
            self._key_data = self._load("sample_data", lambda record: record["is_key_frame"])
            used = {record["ego_pose_token"] for record in self._key_data}
            return self._load("ego_pose", lambda record: record["token"] in used)
        return self._key_data if table_name == "sample_data" else super().__load_table__(table_name)

    def _load(self, table_name: str, keep: Callable[[Row], bool]) -> list[Row]:
        text = (Path(self.table_root) / f"{table_name}.json").read_text()
        return [record for record in json.loads(text, object_hook=lambda record: record if keep(record) else None) if record]


def _open(root: Path, version: str) -> NuScenes:
    try:
        return _KeyFrames(version, str(root), verbose=False)
    except (ValueError, KeyError, AssertionError) as error:
        raise DatasetError(f"the tables in {root / version} cannot be read ({error!r}); unpack the metadata archive again") from error


def _pose(record: Row) -> np.ndarray:
    """(4, 4) transform of a calibrated_sensor (ego_from_sensor) or ego_pose (global_from_ego) record."""
    return geometry.rigid(rotation_matrix(np.array(record["rotation"])), np.array(record["translation"]))


_forked_reader: SceneReader | None = None
"""In a worker process: the parent's reader. Copying the tables (gigabytes) into each worker instead is what this avoids."""


def _over_scenes(reader: SceneReader, workers: int) -> Iterator[list[Row]]:
    scenes = reader.nuscenes.scene
    workers = min(workers, len(scenes))
    if workers <= 1:
        yield from map(reader.read, scenes)
        return
    gc.freeze()  # a collection in a worker would touch, and so copy, all the gigabytes it shares with this process
    try:
        with multiprocessing.get_context("fork").Pool(workers, _adopt, (reader,)) as pool:
            yield from pool.imap(_read_scene, range(len(scenes)), chunksize=1)
    finally:
        gc.unfreeze()


def _adopt(reader: SceneReader) -> None:
    global _forked_reader
    _forked_reader = reader


def _read_scene(index: int) -> list[Row]:
    assert _forked_reader is not None
    return _forked_reader.read(_forked_reader.nuscenes.scene[index])


def _splits(root: Path, version: str) -> dict[str, set[str]]:
    """Scene names of the official splits that belong to the version, and of the user's own in `splits.json`."""
    official = create_splits_scenes()
    ending = next((ending for ending in _OFFICIAL_SPLITS if version.endswith(ending)), None)
    splits = {name: set(official[name]) for name in _OFFICIAL_SPLITS.get(ending or "", ())}
    own = root / version / "splits.json"
    if own.is_file():
        try:
            splits = {**{name: set(scenes) for name, scenes in json.loads(own.read_text()).items()}, **splits}
        except (ValueError, AttributeError, TypeError) as error:
            raise DatasetError(f"{own} must map split names to lists of scene names ({error})") from error
    return splits


def _stack(rows: list[Row], splits: dict[str, set[str]]) -> Infos:
    sizes, first = np.unique([hw for row in rows for hw in row["image_hw"]], axis=0, return_index=True)
    if len(sizes) > 1:
        odd = rows[first[1] // len(CAMERAS)]["token"]
        raise DatasetError(f"camera images differ in size (height, width): {sizes.tolist()}, see sample {odd}; the network needs one size")
    scene_names = [row["scene_name"] for row in rows]
    inside = {name: [scene in scenes for scene in scene_names] for name, scenes in splits.items()}
    inside = {name: members for name, members in inside.items() if any(members)}
    text = {name: np.array([row[name].encode() for row in rows]) for name in ("token", "scene_token", "prev", "next")}
    numbers = ("lidar2img", "ego_from_lidar", "global_from_ego", "quaternion", "can_bus")
    return Infos(
        **text,
        **{name: np.stack([row[name] for row in rows]) for name in numbers},
        timestamp_us=np.array([row["timestamp_us"] for row in rows], dtype=np.int64),
        image_files=np.array([[name.encode() for name in row["image_files"]] for row in rows]),
        image_hw=sizes[0],
        box_start=np.cumsum([0, *(len(row["labels"]) for row in rows)]),
        boxes=np.concatenate([row["boxes"] for row in rows]).astype(np.float32),
        labels=np.concatenate([row["labels"] for row in rows]).astype(np.int64),
        num_points=np.concatenate([row["num_points"] for row in rows]).astype(np.int64),
        split_names=np.array([name.encode() for name in inside], dtype=bytes),
        in_split=np.array(list(inside.values()), dtype=bool).reshape(len(inside), len(rows)),
    )
