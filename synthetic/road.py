"""A road of constant curvature and the car that drives along it. s runs along the road, d to its left, both in metres."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Road:
    """Where road coordinates lie in the global frame.

    Attributes:
        origin: global x and y of s = 0, d = 0.
        yaw: heading of the road at s = 0.
        curvature: change of heading per metre; positive turns left.
    """

    origin: tuple[float, float]
    yaw: float
    curvature: float

    def heading(self, s: np.ndarray | float) -> np.ndarray:
        """Heading of the road at s (...), in the global frame."""
        return self.yaw + self.curvature * np.asarray(s, dtype=np.float64)

    def point(self, s: np.ndarray | float, d: np.ndarray | float = 0.0) -> np.ndarray:
        """(..., 2) global x and y of road coordinates s (...) and d (...)."""
        s, d = np.broadcast_arrays(np.asarray(s, dtype=np.float64), np.asarray(d, dtype=np.float64))
        half_turn = self.curvature * s / 2
        chord = s * np.sinc(half_turn / np.pi)  # exact for an arc, and for a straight line too
        middle, heading = self.yaw + half_turn, self.heading(s)
        x = self.origin[0] + chord * np.cos(middle) - d * np.sin(heading)
        y = self.origin[1] + chord * np.sin(middle) + d * np.cos(heading)
        return np.stack([x, y], -1)


@dataclass(frozen=True)
class EgoMotion:
    """The ego drives along d = 0 with constant acceleration, from s = 0 at t = 0.

    Attributes:
        speed: m/s at t = 0.
        acceleration: m/s^2 along the road.
    """

    speed: float
    acceleration: float

    def travelled(self, t: np.ndarray | float) -> np.ndarray:
        """Metres along the road at time t (...)."""
        t = np.asarray(t, dtype=np.float64)
        return self.speed * t + self.acceleration * t**2 / 2

    def speed_at(self, t: float) -> float:
        """Speed at time t, in m/s."""
        return self.speed + self.acceleration * t
