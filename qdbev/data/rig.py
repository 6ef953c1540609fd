"""The car's sensors: six cameras and a lidar, close to the published nuScenes rig, in rounded numbers.

Ego frame: x forward, y left, z up, origin on the ground below the rear axle. Camera frame: x right, y down, z forward.
Lidar frame: x right, y forward, z up.
"""

from dataclasses import dataclass

import numpy as np

from qdbev.data.config import DataConfig
from qdbev.data.image_transform import NUSCENES_HW, image_transform, scale_lidar2img
from qdbev.geometry import inverse, rigid, rotation_z
from qdbev.schema import CAMERAS

LIDAR = "LIDAR_TOP"
CHANNELS = (*CAMERAS, LIDAR)

_LEVEL_CAM = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # looks along x
_LEVEL_CAM_QUATERNION = [0.5, -0.5, 0.5, -0.5]
_REFERENCE_WIDTH = 1600
_PRINCIPAL_POINT = (816.0, 491.0)  # at the reference width
_MOUNTS = {  # yaw in degrees, translation in metres, focal length in pixels at the reference width, delay in microseconds
    "CAM_FRONT": (0.0, (1.70, 0.0, 1.51), 1266.0, -35_491),
    "CAM_FRONT_RIGHT": (-56.0, (1.55, -0.49, 1.50), 1266.0, -27_612),
    "CAM_FRONT_LEFT": (55.0, (1.52, 0.49, 1.51), 1266.0, -43_107),
    "CAM_BACK": (180.0, (0.03, 0.0, 1.58), 809.0, -10_426),
    "CAM_BACK_LEFT": (109.0, (1.04, 0.48, 1.59), 1266.0, -528),
    "CAM_BACK_RIGHT": (-111.0, (1.01, -0.48, 1.56), 1266.0, -20_058),
    LIDAR: (-90.0, (0.94, 0.0, 1.84), 0.0, 0),
}


@dataclass(frozen=True)
class Sensor:
    """One mounted sensor.

    Attributes:
        channel: nuScenes channel name.
        ego_from_sensor: (3, 3) rotation.
        translation: (3,) position in the ego frame.
        quaternion: the same rotation as (w, x, y, z).
        intrinsic: (3, 3) camera matrix in pixels, or None for the lidar.
        delay_us: microseconds from the key frame's stamp to this sensor's; not positive.
    """

    channel: str
    ego_from_sensor: np.ndarray
    translation: np.ndarray
    quaternion: list[float]
    intrinsic: np.ndarray | None
    delay_us: int


@dataclass(frozen=True)
class View:
    """A sensor at one moment: where it is in the global frame.

    Attributes:
        global_from_sensor: (3, 3) rotation.
        position: (3,) metres.
        intrinsic: (3, 3) camera matrix in pixels, or None for the lidar.
    """

    global_from_sensor: np.ndarray
    position: np.ndarray
    intrinsic: np.ndarray | None


def make_sensor(channel: str, image_width: int) -> Sensor:
    """The sensor of a channel; a camera's intrinsics fit images of `image_width`."""
    yaw_deg, translation, focal, delay_us = _MOUNTS[channel]
    yaw = np.deg2rad(yaw_deg)
    if channel == LIDAR:
        return Sensor(channel, rotation_z(yaw), np.array(translation), yaw_quaternion(yaw), None, delay_us)
    scale = image_width / _REFERENCE_WIDTH
    cx, cy = _PRINCIPAL_POINT
    intrinsic = np.array([[focal * scale, 0, cx * scale], [0, focal * scale, cy * scale], [0, 0, 1]])
    quaternion = quaternion_product(yaw_quaternion(yaw), _LEVEL_CAM_QUATERNION)
    return Sensor(channel, rotation_z(yaw) @ _LEVEL_CAM, np.array(translation), quaternion, intrinsic, delay_us)


def lidar2img(num_cameras: int, image_width: int) -> np.ndarray:
    """(num_cameras, 4, 4) float64 from the lidar frame to pixels of images of that width; more cameras than the rig has repeat it."""
    lidar = make_sensor(LIDAR, image_width)
    ego_from_lidar = rigid(lidar.ego_from_sensor, lidar.translation)
    matrices = []
    for index in range(num_cameras):
        camera = make_sensor(CAMERAS[index % len(CAMERAS)], image_width)
        cam_from_lidar = inverse(rigid(camera.ego_from_sensor, camera.translation)) @ ego_from_lidar
        matrices.append(rigid(camera.intrinsic, np.zeros(3)) @ cam_from_lidar)
    return np.stack(matrices)


def network_rig(config: DataConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """lidar2img (N, 4, 4) into the network's images, and their padded size, where stored images are nuScenes'."""
    transform = image_transform(config, NUSCENES_HW)
    return scale_lidar2img(lidar2img(len(CAMERAS), NUSCENES_HW[1]), transform.scale), transform.padded_hw


def view_from(sensor: Sensor, ego_position: np.ndarray, ego_yaw: float) -> View:
    """The sensor's view from an ego pose: position (3,) and yaw in the global frame."""
    global_from_ego = rotation_z(ego_yaw)
    return View(global_from_ego @ sensor.ego_from_sensor, ego_position + global_from_ego @ sensor.translation, sensor.intrinsic)


def yaw_quaternion(yaw: float) -> list[float]:
    """Quaternion (w, x, y, z) of a rotation by `yaw` about the z axis."""
    return [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]


def quaternion_product(first: list[float], second: list[float]) -> list[float]:
    """Quaternion (w, x, y, z) of the rotation `second`, then `first`."""
    w1, v1 = first[0], np.array(first[1:])
    w2, v2 = second[0], np.array(second[1:])
    vector = w1 * v2 + w2 * v1 + np.cross(v1, v2)
    return [float(w1 * w2 - v1 @ v2), *(float(x) for x in vector)]
