"""A road of constant curvature, and the motion of the ego along it.

Road coordinates: s in metres along the road, d in metres to the left of its axis.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Road:
    """Relation between road coordinates and the global frame.

    Attributes:
        origin: global x and y in metres of s = 0, d = 0.
        yaw: heading of the road at s = 0, in radians.
        curvature: change of heading in radians per metre; positive to the left.
    """

    origin: tuple[float, float]
    yaw: float
    curvature: float

    def heading(self, s: np.ndarray | float) -> np.ndarray:
        """Heading of the road at s (...) in radians, global frame."""
        return self.yaw + self.curvature * np.asarray(s, dtype=np.float64)

    def point(self, s: np.ndarray | float, d: np.ndarray | float = 0.0) -> np.ndarray:
        """(..., 2) global x and y in metres of road coordinates s (...) and d (...)."""
        s, d = np.broadcast_arrays(np.asarray(s, dtype=np.float64), np.asarray(d, dtype=np.float64))
        half_turn = self.curvature * s / 2
        chord = s * np.sinc(half_turn / np.pi)  # exact for an arc and for a straight line
        middle, heading = self.yaw + half_turn, self.heading(s)
        x = self.origin[0] + chord * np.cos(middle) - d * np.sin(heading)
        y = self.origin[1] + chord * np.sin(middle) + d * np.cos(heading)
        return np.stack([x, y], -1)


@dataclass(frozen=True)
class EgoMotion:
    """Motion of the ego along d = 0 with constant acceleration, starting at s = 0 at t = 0.

    Attributes:
        speed: speed in m/s at t = 0.
        acceleration: m/s^2 along the road.
    """

    speed: float
    acceleration: float

    def travelled(self, t: np.ndarray | float) -> np.ndarray:
        """Metres driven along the road until time t (...) in seconds."""
        t = np.asarray(t, dtype=np.float64)
        return self.speed * t + self.acceleration * t**2 / 2

    def speed_at(self, t: float) -> float:
        """Speed in m/s at time t in seconds."""
        return self.speed + self.acceleration * t
