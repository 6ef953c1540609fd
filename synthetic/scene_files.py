"""Writes the files of one scene: images, lidar sweeps and CAN bus messages, and last, in one step, the records of its tables."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from qdbev.data.rig import LIDAR
from qdbev.schema import CAMERAS
from synthetic.boxes import Boxes
from synthetic.can_bus import can_messages
from synthetic.config import WorldConfig
from synthetic.lidar import sweep
from synthetic.renderer import Renderer
from synthetic.street import Street, build_street
from synthetic.tables import sample_path, scene_tables
from synthetic.visibility import count_pixels

PARTS_FOLDER = "parts"
"""Folder in which the records of finished scenes are kept until the tables are written."""

Write = Callable[[str, bytes], None]
"""Writes a file, from its path below the world's root and its content."""


def part_path(root: Path, scene_name: str) -> Path:
    """Path of the records of a finished scene. The file exists only if all other files of the scene do."""
    return root / PARTS_FOLDER / f"{scene_name}.json"


def write_scene(root: Path, config: WorldConfig, scene_name: str) -> None:
    """Write all files of one scene; the folders must exist."""
    digest = hashlib.sha256()

    def write(path: str, content: bytes) -> None:
        digest.update(path.encode() + content)
        (root / path).write_bytes(content)

    street = build_street(config, scene_name)
    renderer = Renderer(street)
    num_points, visible = [], []
    for frame in range(config.num_samples):
        visible.append(_write_images(write, renderer, frame))
        num_points.append(_write_sweep(write, street, frame))
    for message, content in can_messages(street).items():
        write(f"can_bus/{scene_name}_{message}.json", json.dumps(content).encode())
    tables = scene_tables(street, np.array(num_points), np.array(visible))
    replace_text(part_path(root, scene_name), json.dumps({"files": digest.hexdigest(), "tables": tables}))


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step, so that it has either its old content or the whole new one at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _write_images(write: Write, renderer: Renderer, frame: int) -> np.ndarray:
    """Write the six images of a key frame; returns the visible fraction (N,) of each actor, 0 outside all images."""
    street = renderer.street
    pixels = np.zeros((2, len(street.actors)), np.int64)
    for channel in CAMERAS:
        view, t = street.view(channel, frame)
        image, order = renderer.image(channel, frame)
        pixels += count_pixels(view, street.config.image_hw, order, street.actor_boxes(t))
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, street.config.jpeg_quality])
        write(sample_path(street, channel, frame), encoded.tobytes())
    visible, total = pixels
    return visible / np.maximum(total, 1)


def _write_sweep(write: Write, street: Street, frame: int) -> np.ndarray:
    """Write a lidar sweep with every n-th point only; returns the number of points (N,) of the full sweep on each actor."""
    view, t = street.view(LIDAR, frame)
    boxes = Boxes(*map(np.concatenate, zip(street.actor_boxes(t), street.houses, strict=True)))
    points, num_points = sweep(view, boxes, street.config.lidar_columns, street.rng(4, frame))
    write(sample_path(street, LIDAR, frame), points[:: street.config.lidar_stride].tobytes())
    return num_points[: len(street.actors)]
