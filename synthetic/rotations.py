"""Quaternions of the synthetic world's poses and sensors, in the order w, x, y, z that nuScenes' tables use."""

from pyquaternion import Quaternion
from scipy.spatial.transform import Rotation

from qdbev.data.rig import LIDAR, Sensor

_FORWARD_CAMERA = Quaternion(0.5, -0.5, 0.5, -0.5)
"""Rotation of a level camera whose optical axis is the ego's x axis."""


def yaw_quaternion(yaw: float) -> list[float]:
    """Quaternion of a rotation by `yaw` radians, counter-clockwise about the z axis."""
    return Rotation.from_euler("z", yaw).as_quat(scalar_first=True).tolist()


def sensor_quaternion(sensor: Sensor) -> list[float]:
    """Quaternion of the sensor's rotation on the vehicle, `ego_from_sensor`."""
    yaw = yaw_quaternion(sensor.yaw)
    if sensor.channel == LIDAR:
        return yaw
    return (Quaternion(yaw) * _FORWARD_CAMERA).elements.tolist()  # scipy would normalise the product and so change its last bits
