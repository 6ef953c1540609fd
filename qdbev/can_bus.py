"""The 18 numbers of BEVFormer's `can_bus`: absolute as a frame holds them, and relative to the previous frame as a network reads them."""

import numpy as np

SIZE = 18
"""Length of the vector."""
POSITION = slice(0, 3)
"""Indices of the ego vehicle's position in metres, global frame."""
ROTATION = slice(3, 7)
"""Indices of the ego vehicle's rotation, a quaternion (w, x, y, z)."""
YAW_RAD = 16
"""Index of the heading in radians, global frame."""
YAW_DEG = 17
"""Index of the same heading in degrees."""


def relative_can_bus(can_bus: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """Return (18,) float32 with position and yaw in degrees relative to `previous` (18,), or with zeros there if `previous` is None.

    The yaw in radians stays absolute, and the difference in degrees may jump by 360, as in the code that trained the published
    checkpoints (bevformer detectors/bevformer.py at 66b65f3). The time between the frames does not matter: the motion is the difference
    of their poses, so it stays exact when a frame was dropped.
    """
    relative = np.array(can_bus, dtype=np.float64)
    if previous is None:
        relative[POSITION] = 0
        relative[YAW_DEG] = 0
    else:
        relative[POSITION] -= previous[POSITION]
        relative[YAW_DEG] -= previous[YAW_DEG]
    return relative.astype(np.float32)
