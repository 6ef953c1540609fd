"""Records of the thirteen tables of the nuScenes v1.0 schema: those of the whole world, and those of one scene.

Schema: nuscenes-devkit 1.2.0, docs/schema_nuscenes.md. Times are microseconds, lengths metres, sizes width, length and height,
rotations quaternions (w, x, y, z). Poses are in the global frame, except those of calibrated_sensor, which are in the ego frame.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from qdbev.data.nuscenes.files import TABLES
from qdbev.data.rig import CHANNELS, LIDAR, Sensor
from synthetic.actors import Actor
from synthetic.classes import ATTRIBUTES, CATEGORIES, CLASSES
from synthetic.config import KEY_FRAME_INTERVAL, WorldConfig
from synthetic.rotations import sensor_quaternion, yaw_quaternion
from synthetic.street import Street
from synthetic.visibility import LEVELS, level_token

VERSION = "v1.0-trainval"
KEY_FRAME_US = round(KEY_FRAME_INTERVAL * 1e6)
"""Microseconds between key frames."""
_FIRST_STAMP_US = 1_700_000_000_000_000
"""Start of a scene with number 0, in microseconds."""
_SCENE_INTERVAL_US = 3_600_000_000
"""Microseconds from the start of a scene to that of the scene with the next number."""
_LOCATION, _VEHICLE = "synthetic", "n000"
_MIN_VISIBLE_FRACTION = 0.05
"""An object without lidar points is annotated if at least this fraction of it is visible."""

Tables = dict[str, list[dict]]
"""Records of each table, by the table's name."""


@dataclass(frozen=True)
class Observations:
    """Measurements of N actors in F key frames.

    Attributes:
        num_points: (F, N) number of lidar points.
        visible: (F, N) visible fraction in the camera images.
        in_range: (F, N) whether an actor is near enough to the ego to be annotated.
    """

    num_points: np.ndarray
    visible: np.ndarray
    in_range: np.ndarray


def token(seed: int, *key: object) -> str:
    """Token of a record: 32 hexadecimal digits computed from the world's seed and a key."""
    return hashlib.md5("/".join(map(str, (seed, *key))).encode(), usedforsecurity=False).hexdigest()


def scene_start_us(scene_name: str) -> int:
    """Time of the first key frame of a scene in microseconds."""
    return _FIRST_STAMP_US + int(scene_name[-4:]) * _SCENE_INTERVAL_US


def sample_path(scene_name: str, channel: str, frame: int, delay_us: int) -> str:
    """Path of a sensor file, relative to the world's root."""
    suffix = "pcd.bin" if channel == LIDAR else "jpg"
    stamp = scene_start_us(scene_name) + frame * KEY_FRAME_US + delay_us
    return f"samples/{channel}/{_logfile(scene_name)}__{channel}__{stamp}.{suffix}"


def world_tables(config: WorldConfig) -> Tables:
    """Records that do not belong to a single scene; the other tables are empty."""
    tables: Tables = {name: [] for name in TABLES}
    tables["category"] = [
        {"token": token(config.seed, "category", name), "name": name, "description": "", "index": index}
        for index, name in enumerate(CATEGORIES, start=1)
    ]
    tables["attribute"] = [{"token": token(config.seed, "attribute", name), "name": name, "description": ""} for name in ATTRIBUTES]
    tables["visibility"] = [
        {"token": level, "level": name, "description": f"at least {least:.0%} of the object is visible"} for level, name, least in LEVELS
    ]
    tables["sensor"] = [
        {
            "token": token(config.seed, "sensor", channel),
            "channel": channel,
            "modality": "lidar" if channel == LIDAR else "camera",
        }
        for channel in CHANNELS
    ]
    map_token = token(config.seed, "map")
    tables["map"] = [
        {
            "token": map_token,
            "log_tokens": [token(config.seed, "log", name) for name in config.scene_names],
            "category": "semantic_prior",
            "filename": f"maps/{map_token}.png",
        }
    ]
    return tables


def scene_tables(street: Street, scene_name: str, sensors: Sequence[Sensor], observed: Observations) -> Tables:
    """Records of one scene, in the eight tables that scenes add to."""
    seed, frames = street.config.seed, street.config.num_samples
    samples = [token(seed, "sample", scene_name, frame) for frame in range(frames)]
    scene, log = token(seed, "scene", scene_name), token(seed, "log", scene_name)
    start = scene_start_us(scene_name)
    instances, annotations = _annotations(street, scene_name, samples, observed)
    ego_poses, sample_data = _sensor_records(street, scene_name, samples, sensors)
    return {
        "log": [
            {
                "token": log,
                "logfile": _logfile(scene_name),
                "vehicle": _VEHICLE,
                "date_captured": _date(start),
                "location": _LOCATION,
            }
        ],
        "scene": [
            {
                "token": scene,
                "log_token": log,
                "nbr_samples": frames,
                "first_sample_token": samples[0],
                "last_sample_token": samples[-1],
                "name": scene_name,
                "description": f"synthetic {street.config.name}",
            }
        ],
        "sample": [
            {"token": sample, "timestamp": start + frame * KEY_FRAME_US, **_links(samples, frame), "scene_token": scene}
            for frame, sample in enumerate(samples)
        ],
        "calibrated_sensor": [_calibration(seed, scene_name, sensor) for sensor in sensors],
        "ego_pose": ego_poses,
        "sample_data": sample_data,
        "instance": instances,
        "sample_annotation": annotations,
    }


def _sensor_records(street: Street, scene_name: str, samples: list[str], sensors: Sequence[Sensor]) -> tuple[list[dict], list[dict]]:
    ego_poses, sample_data = [], []
    seed, (height, width) = street.config.seed, street.config.image_hw
    for sensor in sensors:
        is_camera = sensor.channel != LIDAR
        tokens = [token(seed, "sample_data", scene_name, sensor.channel, frame) for frame in range(len(samples))]
        for frame, (sample, key) in enumerate(zip(samples, tokens, strict=True)):
            position, yaw = street.ego_pose(street.key_times[frame] + sensor.delay_us / 1e6)
            stamp = scene_start_us(scene_name) + frame * KEY_FRAME_US + sensor.delay_us
            ego_poses.append({"token": key, "timestamp": stamp, "rotation": yaw_quaternion(yaw), "translation": position.tolist()})
            sample_data.append(
                {
                    "token": key,
                    "sample_token": sample,
                    "ego_pose_token": key,
                    "calibrated_sensor_token": token(seed, "calibrated_sensor", scene_name, sensor.channel),
                    "timestamp": stamp,
                    "fileformat": "jpg" if is_camera else "pcd",
                    "is_key_frame": True,
                    "height": height if is_camera else 0,
                    "width": width if is_camera else 0,
                    "filename": sample_path(scene_name, sensor.channel, frame, sensor.delay_us),
                    **_links(tokens, frame),
                }
            )
    return ego_poses, sample_data


def _calibration(seed: int, scene_name: str, sensor: Sensor) -> dict:
    return {
        "token": token(seed, "calibrated_sensor", scene_name, sensor.channel),
        "sensor_token": token(seed, "sensor", sensor.channel),
        "translation": sensor.translation.tolist(),
        "rotation": sensor_quaternion(sensor),
        "camera_intrinsic": [] if sensor.intrinsic is None else sensor.intrinsic.tolist(),
    }


def _annotations(street: Street, scene_name: str, samples: list[str], observed: Observations) -> tuple[list[dict], list[dict]]:
    """Records of instances and annotations. An instance is annotated from the first to the last frame in which it is observed."""
    poses = [street.actor_poses(t) for t in street.key_times]
    annotated = observed.in_range & ((observed.num_points > 0) | (observed.visible >= _MIN_VISIBLE_FRACTION))
    instances, annotations = [], []
    for index, actor in enumerate(street.actors):
        frames = np.nonzero(annotated[:, index])[0]
        if not len(frames):
            continue
        span = range(frames[0], frames[-1] + 1)
        instance = token(street.config.seed, "instance", scene_name, index)
        tokens = [token(street.config.seed, "annotation", scene_name, index, frame) for frame in span]
        for place, frame in enumerate(span):
            centres, yaws = poses[frame]
            annotations.append(
                {
                    "token": tokens[place],
                    "sample_token": samples[frame],
                    "instance_token": instance,
                    "visibility_token": level_token(observed.visible[frame, index]),
                    "attribute_tokens": _attributes(street.config.seed, actor),
                    "translation": centres[index].tolist(),
                    "size": list(actor.wlh),
                    "rotation": yaw_quaternion(yaws[index]),
                    **_links(tokens, place),
                    "num_lidar_pts": int(observed.num_points[frame, index]),
                    "num_radar_pts": 0,
                }
            )
        instances.append(
            {
                "token": instance,
                "category_token": token(street.config.seed, "category", CLASSES[actor.class_name].category),
                "nbr_annotations": len(tokens),
                "first_annotation_token": tokens[0],
                "last_annotation_token": tokens[-1],
            }
        )
    return instances, annotations


def _attributes(seed: int, actor: Actor) -> list[str]:
    return [token(seed, "attribute", actor.attribute)] if actor.attribute else []


def _links(tokens: list[str], place: int) -> dict[str, str]:
    """Tokens of the neighbours of the record at index `place`, empty at the ends of the list."""
    return {
        "prev": tokens[place - 1] if place > 0 else "",
        "next": tokens[place + 1] if place + 1 < len(tokens) else "",
    }


def _logfile(scene_name: str) -> str:
    return f"{_VEHICLE}-{_date(scene_start_us(scene_name))}-{scene_name[-4:]}"


def _date(stamp_us: int) -> str:
    return datetime.fromtimestamp(stamp_us // 1_000_000, tz=UTC).strftime("%Y-%m-%d")
