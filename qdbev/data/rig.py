"""A vehicle's sensors for synthetic inputs: six cameras and a lidar, close to the published nuScenes calibration, in rounded numbers.

Ego frame: x forward, y left, z up, origin on the ground below the rear axle. Camera frame: x right, y down, z forward.
Lidar frame: x right, y forward, z up.
"""

from dataclasses import dataclass

import numpy as np

from qdbev.data.config import DataConfig
from qdbev.data.image_transform import image_transform, scale_lidar2img
from qdbev.geometry import inverse, rigid, rotation_z
from qdbev.schema import CAMERAS

LIDAR = "LIDAR_TOP"
CHANNELS = (*CAMERAS, LIDAR)
"""nuScenes channel names of all sensors."""

_EGO_FROM_FORWARD_CAM = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
"""Rotation of a level camera whose optical axis is the ego's x axis."""
_REFERENCE_WIDTH = 1600
"""Image width in pixels for which the principal point (column, row) and the focal lengths below are given."""
_PRINCIPAL_POINT = (816.0, 491.0)
_MOUNTS = {
    "CAM_FRONT": (0.0, (1.70, 0.0, 1.51), 1266.0, -35_491),
    "CAM_FRONT_RIGHT": (-56.0, (1.55, -0.49, 1.50), 1266.0, -27_612),
    "CAM_FRONT_LEFT": (55.0, (1.52, 0.49, 1.51), 1266.0, -43_107),
    "CAM_BACK": (180.0, (0.03, 0.0, 1.58), 809.0, -10_426),
    "CAM_BACK_LEFT": (109.0, (1.04, 0.48, 1.59), 1266.0, -528),
    "CAM_BACK_RIGHT": (-111.0, (1.01, -0.48, 1.56), 1266.0, -20_058),
    LIDAR: (-90.0, (0.94, 0.0, 1.84), 0.0, 0),
}
"""For each channel: yaw in degrees, position in metres (ego frame), focal length in pixels, delay in microseconds (see `Sensor`)."""


@dataclass(frozen=True)
class Sensor:
    """One sensor and how it is mounted on the vehicle."""

    channel: str
    yaw: float
    """Direction of a camera's optical axis, or of the lidar's x axis, counter-clockwise from the ego's x axis, in radians."""
    ego_from_sensor: np.ndarray
    """(3, 3) rotation."""
    translation: np.ndarray
    """(3,) position in metres, ego frame."""
    intrinsic: np.ndarray | None
    """(3, 3) camera matrix in pixels, or None for the lidar."""
    delay_us: int
    """Time of this sensor's measurement minus the time of the key frame, in microseconds; zero or negative."""


@dataclass(frozen=True)
class View:
    """Pose of a sensor in the global frame at one moment: a rotation (3, 3), a position (3,) in metres, and the sensor's intrinsics."""

    global_from_sensor: np.ndarray
    position: np.ndarray
    intrinsic: np.ndarray | None


def make_sensor(channel: str, image_width: int) -> Sensor:
    """The sensor of a channel. A camera's intrinsics are for images of width `image_width` in pixels."""
    yaw_deg, translation, focal, delay_us = _MOUNTS[channel]
    yaw = np.deg2rad(yaw_deg)
    if channel == LIDAR:
        return Sensor(channel, yaw, rotation_z(yaw), np.array(translation), None, delay_us)
    scale = image_width / _REFERENCE_WIDTH
    cx, cy = _PRINCIPAL_POINT
    intrinsic = np.array([[focal * scale, 0, cx * scale], [0, focal * scale, cy * scale], [0, 0, 1]])
    return Sensor(channel, yaw, rotation_z(yaw) @ _EGO_FROM_FORWARD_CAM, np.array(translation), intrinsic, delay_us)


def lidar2img(num_cameras: int, image_width: int) -> np.ndarray:
    """(num_cameras, 4, 4) float64 from the lidar frame to pixels of images of width `image_width`.

    If `num_cameras` is more than six, the six cameras are repeated. The ego does not move between the times of camera and lidar.
    """
    lidar = make_sensor(LIDAR, image_width)
    ego_from_lidar = rigid(lidar.ego_from_sensor, lidar.translation)
    matrices = []
    for index in range(num_cameras):
        camera = make_sensor(CAMERAS[index % len(CAMERAS)], image_width)
        cam_from_lidar = inverse(rigid(camera.ego_from_sensor, camera.translation)) @ ego_from_lidar
        matrices.append(rigid(camera.intrinsic, np.zeros(3)) @ cam_from_lidar)
    return np.stack(matrices)


def network_rig(config: DataConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """lidar2img (6, 4, 4) for the network's input images, and their padded (height, width), from stored images of `config.stored_hw`."""
    transform = image_transform(config, config.stored_hw)
    return scale_lidar2img(lidar2img(len(CAMERAS), config.stored_hw[1]), transform.scale), transform.padded_hw


def view_from(sensor: Sensor, ego_position: np.ndarray, ego_yaw: float) -> View:
    """Pose of the sensor in the global frame for an ego at position (3,) in metres with a heading of `ego_yaw` radians."""
    global_from_ego = rotation_z(ego_yaw)
    return View(global_from_ego @ sensor.ego_from_sensor, ego_position + global_from_ego @ sensor.translation, sensor.intrinsic)
