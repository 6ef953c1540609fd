"""Reads the tables of a dataset in nuScenes format through the devkit and returns them as `Infos`.

Numbers are computed as in BEVFormer 66b65f3 (tools/data_converter/nuscenes_converter.py) and mmdet3d 0.17.1: boxes are in the SECOND
convention, velocities come from neighbouring annotations, and `lidar2img` includes the ego motion between the times of camera and lidar.
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

from qdbev import geometry
from qdbev.can_bus import absolute_can_bus
from qdbev.data.infos import DatasetError, Infos
from qdbev.data.nuscenes.completeness import scenes_without_can_signals
from qdbev.schema import CAMERAS, CLASSES

_LIDAR = "LIDAR_TOP"
_OFFICIAL_SPLITS = {"trainval": ("train", "val", "train_detect", "train_track"), "mini": ("mini_train", "mini_val"), "test": ("test",)}
"""Official splits of each version; the key is the ending of the version's name, which the official evaluation checks too."""

Record = dict[str, Any]
"""One record of a nuScenes table."""
SampleFields = dict[str, Any]
"""The values of one sample for the fields of `Infos`."""


def read(root: Path, version: str, workers: int) -> Infos:
    """Infos of all samples of `root/version`, read scene by scene in `workers` processes, or in this process if `workers` is 0.

    Raises:
        DatasetError: Tables or CAN signals are damaged or contradict each other, or the camera images differ in size.
    """
    with tqdm(desc=f"reading {version}", unit="scene", disable=None) as bar:
        reader = SceneReader(root, _open(root, version))
        bar.reset(total=len(reader.nuscenes.scene))
        samples = []
        for of_scene in _read_scenes(reader, workers):
            samples += of_scene
            bar.update()
    if not samples:
        raise DatasetError(f"{root / version} has no samples; unpack the metadata archive again")
    samples.sort(key=lambda sample: sample["timestamp_us"])
    return _stack(samples, _splits(root, version))


class SceneReader:
    """Reads the samples of one scene at a time. G is the number of boxes of a sample."""

    def __init__(self, root: Path, nuscenes: NuScenes) -> None:
        self.nuscenes = nuscenes
        self._can_folder = root / "can_bus"
        self._without_can = scenes_without_can_signals(root)

    def read(self, scene: Record) -> list[SampleFields]:
        """The scene's samples in order of time, each with the fields of `Infos` and the scene's name as `scene_name`."""
        times, signals = self._can_signals(scene["name"])
        samples, token = [], scene["first_sample_token"]
        while token:
            sample = self.nuscenes.get("sample", token)
            # As in BEVFormer's converter, a sample gets the signals of the first message after it.
            after = np.searchsorted(times, sample["timestamp"], side="right").clip(max=len(times) - 1)
            samples.append({"scene_name": scene["name"], **self._sample_fields(sample, signals[after])})
            token = sample["next"]
        return samples

    def _can_signals(self, scene_name: str) -> tuple[np.ndarray, np.ndarray]:
        """(M,) times in microseconds and (M, 9) signals of the scene's pose messages; one message of zeros if the scene has none."""
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

    def _sample_fields(self, sample: Record, signals: np.ndarray) -> SampleFields:
        absent = [channel for channel in (_LIDAR, *CAMERAS) if channel not in sample["data"]]
        if absent:
            raise DatasetError(f"sample {sample['token']} has no key frame of {', '.join(absent)}; the tables are incomplete")
        _, calibration, ego_pose = self._sensor(sample, _LIDAR)
        ego_from_lidar, global_from_ego = _pose(calibration), _pose(ego_pose)
        lidar_from_global = geometry.inverse(global_from_ego @ ego_from_lidar)
        cameras = [self._camera(sample, camera, lidar_from_global) for camera in CAMERAS]
        return {
            "token": sample["token"],
            "scene_token": sample["scene_token"],
            "timestamp_us": sample["timestamp"],
            "image_files": [image["filename"] for image, _ in cameras],
            "image_hw": [(image["height"], image["width"]) for image, _ in cameras],
            "lidar2img": np.stack([matrix for _, matrix in cameras]),
            "ego_from_lidar": ego_from_lidar,
            "global_from_ego": global_from_ego,
            "quaternion": np.array(ego_pose["rotation"]),
            "can_bus": absolute_can_bus(signals, np.array(ego_pose["rotation"]), np.array(ego_pose["translation"])),
            **self._boxes(sample, lidar_from_global),
        }

    def _sensor(self, sample: Record, channel: str) -> tuple[Record, Record, Record]:
        """The sample_data, calibrated_sensor and ego_pose records of a sensor, the last at the time of its measurement."""
        data = self.nuscenes.get("sample_data", sample["data"][channel])
        calibration = self.nuscenes.get("calibrated_sensor", data["calibrated_sensor_token"])
        return data, calibration, self.nuscenes.get("ego_pose", data["ego_pose_token"])

    def _camera(self, sample: Record, channel: str, lidar_from_global: np.ndarray) -> tuple[Record, np.ndarray]:
        """The sample_data record and the (4, 4) lidar2img of one camera."""
        image, calibration, ego_pose = self._sensor(sample, channel)
        cam_from_lidar = geometry.inverse(lidar_from_global @ _pose(ego_pose) @ _pose(calibration))
        img_from_cam = geometry.rigid(np.array(calibration["camera_intrinsic"]), np.zeros(3))
        return image, img_from_cam @ cam_from_lidar

    def _boxes(self, sample: Record, lidar_from_global: np.ndarray) -> SampleFields:
        """boxes (G, 9), labels (G,) and num_points (G,) of the objects of the ten classes."""
        found = [self.nuscenes.get("sample_annotation", token) for token in sample["anns"]]
        names = [category_to_detection_name(annotation["category_name"]) for annotation in found]
        annotations = [annotation for annotation, name in zip(found, names, strict=True) if name in CLASSES]
        boxes = np.zeros((len(annotations), 9))
        if annotations:
            rotation = lidar_from_global[:3, :3]
            centers = np.array([a["translation"] for a in annotations])
            lidar_from_box = rotation @ _rotation_matrices(np.array([a["rotation"] for a in annotations]))  # (G, 3, 3)
            velocity = np.array([self.nuscenes.box_velocity(a["token"]) for a in annotations])
            velocity[:, 2] = 0  # as in BEVFormer's converter, which rotates the horizontal part only
            boxes[:, :3] = centers @ rotation.T + lidar_from_global[:3, 3]
            boxes[:, 3:6] = [a["size"] for a in annotations]
            boxes[:, 6] = -np.arctan2(-lidar_from_box[:, 0, 1], lidar_from_box[:, 0, 0]) - np.pi / 2
            boxes[:, 7:] = np.nan_to_num(velocity @ rotation.T, nan=0.0)[:, :2]
        return {
            "boxes": boxes,
            "labels": [CLASSES.index(name) for name in names if name in CLASSES],
            "num_points": [annotation["num_lidar_pts"] + annotation["num_radar_pts"] for annotation in annotations],
        }


class _KeyFrames(NuScenes):
    """The devkit's tables with key frames only. The rest, nine tenths of nuScenes' sensor files and ego poses, is dropped on reading."""

    def __load_table__(self, table_name: str) -> list[Record]:
        if table_name == "ego_pose":  # the devkit loads it before sample_data, which names the poses that are needed
            self._key_data = self._load("sample_data", lambda record: record["is_key_frame"])
            used = {record["ego_pose_token"] for record in self._key_data}
            return self._load("ego_pose", lambda record: record["token"] in used)
        return self._key_data if table_name == "sample_data" else super().__load_table__(table_name)

    def _load(self, table_name: str, keep: Callable[[Record], bool]) -> list[Record]:
        text = (Path(self.table_root) / f"{table_name}.json").read_text()
        return [record for record in json.loads(text, object_hook=lambda record: record if keep(record) else None) if record]


def _open(root: Path, version: str) -> NuScenes:
    try:
        return _KeyFrames(version, str(root), verbose=False)
    except (ValueError, KeyError, AssertionError) as error:
        raise DatasetError(f"the tables in {root / version} cannot be read ({error!r}); unpack the metadata archive again") from error


def _rotation_matrices(quaternions: np.ndarray) -> np.ndarray:
    """(..., 3, 3) rotation matrices of quaternions (..., 4) in the order w, x, y, z, which need not be of unit length."""
    # scipy's formula differs in the last bits. Multiplied by kilometres they would change `lidar2img`, and every network trained on it.
    q = np.asarray(quaternions, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _pose(record: Record) -> np.ndarray:
    """(4, 4) transform of a calibrated_sensor record (ego_from_sensor) or an ego_pose record (global_from_ego)."""
    return geometry.rigid(_rotation_matrices(np.array(record["rotation"])), np.array(record["translation"]))


_forked_reader: SceneReader | None = None
"""In a worker process, the reader of the parent process. Workers inherit it by forking, so that gigabytes of tables are not copied."""


def _read_scenes(reader: SceneReader, workers: int) -> Iterator[list[SampleFields]]:
    """The samples of one scene after the other."""
    scenes = reader.nuscenes.scene
    workers = min(workers, len(scenes))
    if workers <= 1:
        yield from map(reader.read, scenes)
        return
    gc.freeze()  # a garbage collection in a worker would write to, and so copy, all the memory that it shares with this process
    try:
        with multiprocessing.get_context("fork").Pool(workers, _set_forked_reader, (reader,)) as pool:
            yield from pool.imap(_read_scene, range(len(scenes)), chunksize=1)
    finally:
        gc.unfreeze()


def _set_forked_reader(reader: SceneReader) -> None:
    global _forked_reader
    _forked_reader = reader


def _read_scene(index: int) -> list[SampleFields]:
    assert _forked_reader is not None
    return _forked_reader.read(_forked_reader.nuscenes.scene[index])


def _splits(root: Path, version: str) -> dict[str, set[str]]:
    """Scene names of each official split of the version, and of each split in the user's own `splits.json`."""
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


def _stack(samples: list[SampleFields], splits: dict[str, set[str]]) -> Infos:
    """Infos from the samples in order of time and the scene names of each split; splits without a sample are left out."""
    sizes, first = np.unique([hw for sample in samples for hw in sample["image_hw"]], axis=0, return_index=True)
    if len(sizes) > 1:
        token = samples[first[1] // len(CAMERAS)]["token"]
        raise DatasetError(
            f"camera images differ in size (height, width): {sizes.tolist()}, for example in sample {token}; the network needs one size, "
            "so rescale the images and their intrinsics"
        )
    scene_names = [sample["scene_name"] for sample in samples]
    inside = {name: [scene in scenes for scene in scene_names] for name, scenes in splits.items()}
    inside = {name: members for name, members in inside.items() if any(members)}
    text = {name: np.array([sample[name].encode() for sample in samples]) for name in ("token", "scene_token")}
    numbers = ("lidar2img", "ego_from_lidar", "global_from_ego", "quaternion", "can_bus")
    return Infos(
        **text,
        **{name: np.stack([sample[name] for sample in samples]) for name in numbers},
        timestamp_us=np.array([sample["timestamp_us"] for sample in samples], dtype=np.int64),
        image_files=np.array([[name.encode() for name in sample["image_files"]] for sample in samples]),
        image_hw=sizes[0],
        box_start=np.cumsum([0, *(len(sample["labels"]) for sample in samples)]),
        boxes=np.concatenate([sample["boxes"] for sample in samples]).astype(np.float32),
        labels=np.concatenate([sample["labels"] for sample in samples]).astype(np.int64),
        num_points=np.concatenate([sample["num_points"] for sample in samples]).astype(np.int64),
        split_names=np.array([name.encode() for name in inside], dtype=bytes),
        in_split=np.array(list(inside.values()), dtype=bool).reshape(len(inside), len(samples)),
    )
