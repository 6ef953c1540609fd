"""Records of the thirteen tables of the nuScenes v1.0 schema: those of the whole world, and those of one scene.

Schema: nuscenes-devkit 1.2.0, docs/schema_nuscenes.md. Times are microseconds, lengths metres, sizes width, length and height,
rotations quaternions (w, x, y, z). Poses are in the global frame, except those of calibrated_sensor, which are in the ego frame.
"""

import functools
import hashlib
from datetime import UTC, datetime

import numpy as np
from pyquaternion import Quaternion
from scipy.spatial.transform import Rotation

from qdbev.data.nuscenes.files import TABLES
from qdbev.data.rig import CHANNELS, LIDAR, Sensor
from synthetic.classes import ATTRIBUTES, CATEGORIES, CLASSES
from synthetic.config import KEY_FRAME_INTERVAL, WorldConfig
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
_FORWARD_CAMERA = Quaternion(0.5, -0.5, 0.5, -0.5)
"""Rotation of a level camera whose optical axis is the ego's x axis."""

Tables = dict[str, list[dict]]
"""Records of each table, by the table's name."""


def token(seed: int, *key: object) -> str:
    """Token of a record: 32 hexadecimal digits computed from the world's seed and a key."""
    return hashlib.md5("/".join(map(str, (seed, *key))).encode(), usedforsecurity=False).hexdigest()


def scene_start_us(scene_name: str) -> int:
    """Time of the first key frame of a scene in microseconds."""
    return _FIRST_STAMP_US + int(scene_name[-4:]) * _SCENE_INTERVAL_US


def sample_path(street: Street, channel: str, frame: int) -> str:
    """Path of a sensor file, relative to the world's root."""
    suffix = "pcd.bin" if channel == LIDAR else "jpg"
    stamp = _stamp_us(street, street.sensors[channel], frame)
    return f"samples/{channel}/{_logfile(street.scene_name)}__{channel}__{stamp}.{suffix}"


def yaw_quaternion(yaw: float) -> list[float]:
    """Quaternion of a rotation by `yaw` radians, counter-clockwise about the z axis."""
    return Rotation.from_euler("z", yaw).as_quat(scalar_first=True).tolist()


def world_tables(config: WorldConfig) -> Tables:
    """Records that do not belong to a single scene; the other tables are empty."""
    key = functools.partial(token, config.seed)
    return {
        **{table: [] for table in TABLES},
        "category": [
            {"token": key("category", name), "name": name, "description": "", "index": index}
            for index, name in enumerate(CATEGORIES, start=1)
        ],
        "attribute": [{"token": key("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES],
        "visibility": [
            {"token": level, "level": name, "description": f"at least {least:.0%} of the object is visible"}
            for level, name, least in LEVELS
        ],
        "sensor": [
            {"token": key("sensor", channel), "channel": channel, "modality": "lidar" if channel == LIDAR else "camera"}
            for channel in CHANNELS
        ],
        "map": [
            {
                "token": key("map"),
                "log_tokens": [key("log", name) for name in config.scene_names],
                "category": "semantic_prior",
                "filename": f"maps/{key('map')}.png",
            }
        ],
    }


def scene_tables(street: Street, num_points: np.ndarray, visible: np.ndarray) -> Tables:
    """Records of one scene, in the eight tables that scenes add to.

    Args:
        num_points: (F, N) number of lidar points on each actor in each key frame.
        visible: (F, N) visible fraction of each actor in the camera images.
    """
    name, num_samples = street.scene_name, street.config.num_samples
    key = functools.partial(token, street.config.seed)
    start = scene_start_us(name)
    samples = [key("sample", name, frame) for frame in range(num_samples)]
    log = {"token": key("log", name), "logfile": _logfile(name), "vehicle": _VEHICLE, "date_captured": _date(name), "location": _LOCATION}
    scene = {
        "token": key("scene", name),
        "log_token": log["token"],
        "nbr_samples": num_samples,
        "first_sample_token": samples[0],
        "last_sample_token": samples[-1],
        "name": name,
        "description": f"synthetic {street.config.name}",
    }
    return {
        "log": [log],
        "scene": [scene],
        "sample": [
            {"token": sample, "timestamp": start + frame * KEY_FRAME_US, **_links(samples, frame), "scene_token": scene["token"]}
            for frame, sample in enumerate(samples)
        ],
        **_sensor_tables(street, samples),
        **_object_tables(street, samples, num_points, visible),
    }


def _sensor_tables(street: Street, samples: list[str]) -> Tables:
    name, (height, width) = street.scene_name, street.config.image_hw
    key = functools.partial(token, street.config.seed)
    calibrations, ego_poses, sample_data = [], [], []
    for channel, sensor in street.sensors.items():
        is_camera = channel != LIDAR
        calibrations.append(
            {
                "token": key("calibrated_sensor", name, channel),
                "sensor_token": key("sensor", channel),
                "translation": sensor.translation.tolist(),
                "rotation": _sensor_quaternion(sensor),
                "camera_intrinsic": sensor.intrinsic.tolist() if is_camera else [],
            }
        )
        tokens = [key("sample_data", name, channel, frame) for frame in range(len(samples))]
        for frame, sample in enumerate(samples):
            position, yaw = street.ego_pose(street.key_times[frame] + sensor.delay_us / 1e6)
            moment = {"token": tokens[frame], "timestamp": _stamp_us(street, sensor, frame)}
            ego_poses.append({**moment, "rotation": yaw_quaternion(yaw), "translation": position.tolist()})
            sample_data.append(
                {
                    "token": tokens[frame],
                    "sample_token": sample,
                    "ego_pose_token": tokens[frame],
                    "calibrated_sensor_token": calibrations[-1]["token"],
                    "timestamp": moment["timestamp"],
                    "fileformat": "jpg" if is_camera else "pcd",
                    "is_key_frame": True,
                    "height": height if is_camera else 0,
                    "width": width if is_camera else 0,
                    "filename": sample_path(street, channel, frame),
                    **_links(tokens, frame),
                }
            )
    return {"calibrated_sensor": calibrations, "ego_pose": ego_poses, "sample_data": sample_data}


def _object_tables(street: Street, samples: list[str], num_points: np.ndarray, visible: np.ndarray) -> Tables:
    """Instances and annotations. An instance is annotated from the first to the last frame in which it is observed."""
    key = functools.partial(token, street.config.seed)
    boxes = [street.actor_boxes(t) for t in street.key_times]
    observed = street.in_range() & ((num_points > 0) | (visible >= _MIN_VISIBLE_FRACTION))
    instances, annotations = [], []
    for index, actor in enumerate(street.actors):
        frames = np.nonzero(observed[:, index])[0]
        if not len(frames):
            continue
        span = range(frames[0], frames[-1] + 1)
        instance = key("instance", street.scene_name, index)
        tokens = [key("annotation", street.scene_name, index, frame) for frame in span]
        for place, frame in enumerate(span):
            annotations.append(
                {
                    "token": tokens[place],
                    "sample_token": samples[frame],
                    "instance_token": instance,
                    "visibility_token": level_token(visible[frame, index]),
                    "attribute_tokens": [key("attribute", actor.attribute)] if actor.attribute else [],
                    "translation": boxes[frame].centres[index].tolist(),
                    "size": list(actor.wlh),
                    "rotation": yaw_quaternion(boxes[frame].yaws[index]),
                    **_links(tokens, place),
                    "num_lidar_pts": int(num_points[frame, index]),
                    "num_radar_pts": 0,
                }
            )
        instances.append(
            {
                "token": instance,
                "category_token": key("category", CLASSES[actor.class_name].category),
                "nbr_annotations": len(tokens),
                "first_annotation_token": tokens[0],
                "last_annotation_token": tokens[-1],
            }
        )
    return {"instance": instances, "sample_annotation": annotations}


def _sensor_quaternion(sensor: Sensor) -> list[float]:
    yaw = yaw_quaternion(sensor.yaw)
    if sensor.channel == LIDAR:
        return yaw
    return (Quaternion(yaw) * _FORWARD_CAMERA).elements.tolist()  # scipy would normalise the product and so change its last bits


def _links(tokens: list[str], place: int) -> dict[str, str]:
    """Tokens of the neighbours of the record at index `place`, empty at the ends of the list."""
    padded = ["", *tokens, ""]
    return {"prev": padded[place], "next": padded[place + 2]}


def _stamp_us(street: Street, sensor: Sensor, frame: int) -> int:
    return scene_start_us(street.scene_name) + frame * KEY_FRAME_US + sensor.delay_us


def _logfile(scene_name: str) -> str:
    return f"{_VEHICLE}-{_date(scene_name)}-{scene_name[-4:]}"


def _date(scene_name: str) -> str:
    return datetime.fromtimestamp(scene_start_us(scene_name) // 1_000_000, tz=UTC).date().isoformat()
