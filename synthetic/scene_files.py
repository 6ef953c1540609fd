"""Writes the files of one scene: images, lidar sweeps and CAN bus messages, and last, in one step, the records of its tables."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np

from qdbev.data.rig import CHANNELS, LIDAR, Sensor, View, make_sensor, view_from
from qdbev.schema import CAMERAS
from synthetic.boxes import box_corners
from synthetic.can_bus import can_messages
from synthetic.config import WorldConfig
from synthetic.lidar import sweep
from synthetic.renderer import Renderer
from synthetic.street import Street, build_street
from synthetic.tables import Observations, sample_path, scene_start_us, scene_tables
from synthetic.visibility import VisibilityBuffer

PARTS_FOLDER = "parts"
"""Folder in which the records of finished scenes are kept until the tables are written."""
_GAIN_RANGE = (0.92, 1.08)
"""Range from which the brightness factor of each camera is drawn."""


class SceneCameras:
    """Renders the images of one scene. Images do not depend on which others are rendered, or in which order."""

    def __init__(self, config: WorldConfig, scene_name: str) -> None:
        self.street: Street = build_street(config, scene_name)
        self.sensors: dict[str, Sensor] = {channel: make_sensor(channel, config.image_hw[1]) for channel in CHANNELS}
        self._key = (config.seed, int(scene_name[-4:]))
        self._renderer = Renderer(self.street, self.rng(1))

    def rng(self, *purpose: int) -> np.random.Generator:
        """A random generator that depends on the world's seed, the scene and the numbers in `purpose` only."""
        return np.random.default_rng((*self._key, 1_000_000, *purpose))

    def view(self, channel: str, frame: int) -> tuple[View, float]:
        """Pose of a sensor at a key frame, and the time of its measurement in seconds."""
        sensor = self.sensors[channel]
        t = float(self.street.key_times[frame]) + sensor.delay_us / 1e6
        return view_from(sensor, *self.street.ego_pose(t)), t

    def image(self, channel: str, frame: int, skip: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """A camera's image (H, W, 3) without the actors in `skip`, and the indices of the actors that may appear in it, far to near."""
        number = CHANNELS.index(channel)
        gain = float(self.rng(2, number).uniform(*_GAIN_RANGE))
        view, t = self.view(channel, frame)
        return self._renderer.render(view, t, gain, self.rng(3, number, frame), skip)


def part_path(root: Path, scene_name: str) -> Path:
    """Path of the records of a finished scene. The file exists only if all other files of the scene do."""
    return root / PARTS_FOLDER / f"{scene_name}.json"


def write_scene(root: Path, config: WorldConfig, scene_name: str) -> None:
    """Write all files of one scene; the folders must exist."""
    cameras = SceneCameras(config, scene_name)
    street = cameras.street
    files = _HashedFiles(root)
    num_points, visible = [], []
    for frame in range(config.num_samples):
        visible.append(_write_images(files, cameras, scene_name, frame))
        num_points.append(_write_sweep(files, cameras, scene_name, frame))
    for message, content in can_messages(street, scene_start_us(scene_name)).items():
        files.write(f"can_bus/{scene_name}_{message}.json", json.dumps(content).encode())
    in_range = np.array([street.in_range(t) for t in street.key_times])
    observed = Observations(np.array(num_points), np.array(visible), in_range)
    tables = scene_tables(street, scene_name, list(cameras.sensors.values()), observed)
    replace_text(part_path(root, scene_name), json.dumps({"files": files.digest.hexdigest(), "tables": tables}))


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, so that it has either its old content or the whole new one at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


class _HashedFiles:
    """Writes files below a folder and computes a SHA-256 digest of all of them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.digest = hashlib.sha256()

    def write(self, path: str, content: bytes) -> None:
        self.digest.update(path.encode() + content)
        (self._root / path).write_bytes(content)


def _write_images(files: _HashedFiles, cameras: SceneCameras, scene_name: str, frame: int) -> np.ndarray:
    """Write the six images of a key frame; returns the visible fraction (N,) of each actor."""
    street = cameras.street
    buffer = VisibilityBuffer(len(street.actors), street.config.image_hw)
    for channel in CAMERAS:
        view, t = cameras.view(channel, frame)
        image, order = cameras.image(channel, frame)
        buffer.add(view, order, box_corners(*street.actor_poses(t), street.wlh))
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, street.config.jpeg_quality])
        files.write(sample_path(scene_name, channel, frame, cameras.sensors[channel].delay_us), encoded.tobytes())
    return buffer.fractions()


def _write_sweep(files: _HashedFiles, cameras: SceneCameras, scene_name: str, frame: int) -> np.ndarray:
    """Write a lidar sweep with every n-th point only; returns the number of points (N,) of the full sweep on each actor."""
    street = cameras.street
    view, t = cameras.view(LIDAR, frame)
    centres, yaws = street.actor_poses(t)
    houses = street.buildings
    boxes = (
        np.concatenate([centres, np.array([house.centre for house in houses]).reshape(-1, 3)]),
        np.concatenate([yaws, [house.yaw for house in houses]]),
        np.concatenate([street.wlh, np.array([house.wlh for house in houses]).reshape(-1, 3)]),
    )
    points, num_points = sweep(view, boxes, street.config.lidar_columns, cameras.rng(4, frame))
    files.write(sample_path(scene_name, LIDAR, frame, 0), points[:: street.config.lidar_stride].tobytes())
    return num_points[: len(street.actors)]
