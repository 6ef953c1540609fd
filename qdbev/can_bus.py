"""The 18 numbers of BEVFormer's `can_bus`: absolute as a frame holds them, and relative to the previous frame as a network reads them."""

import numpy as np

SIZE = 18
POSITION = slice(0, 3)  # of the ego vehicle in metres, global frame
ROTATION = slice(3, 7)  # of the ego vehicle, a quaternion (w, x, y, z)
SIGNALS = slice(7, 16)  # acceleration (m/s^2), rotation rate (rad/s) and velocity (m/s), each as x, y, z
YAW_RAD = 16  # heading in radians, global frame
YAW_DEG = 17  # the same heading in degrees


def absolute_can_bus(signals: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """The (18,) float64 vector of one frame, with the error of the code that trained the published checkpoints.

    `rotation` is the quaternion (4,), of which [3:7] gets w four times (see `DataConfig.full_quaternion`); the yaw is in [0, 2 pi).
    """
    w, x, y, z = rotation / np.linalg.norm(rotation, axis=-1, keepdims=True)
    yaw_deg = np.rad2deg(np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)))
    if yaw_deg < 0:
        yaw_deg += 360
    vector = np.empty(SIZE)
    vector[POSITION] = translation
    vector[ROTATION] = rotation[0]
    vector[SIGNALS] = signals
    vector[YAW_RAD] = np.deg2rad(yaw_deg)
    vector[YAW_DEG] = yaw_deg
    return vector


def relative_can_bus(can_bus: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """Return (18,) float32 with position and yaw in degrees relative to `previous` (18,), or with zeros there if `previous` is None.

    The yaw in radians stays absolute, and the difference in degrees may jump by 360, as in the code that trained the published
    checkpoints (bevformer detectors/bevformer.py at 66b65f3). It is the difference of two poses, so it stays exact if a frame was dropped.
    """
    relative = np.array(can_bus, dtype=np.float64)
    if previous is None:
        relative[POSITION] = 0
        relative[YAW_DEG] = 0
    else:
        relative[POSITION] -= previous[POSITION]
        relative[YAW_DEG] -= previous[YAW_DEG]
    return relative.astype(np.float32)
