"""Simulates a spinning lidar with 32 beams: casts its rays against boxes and the ground.

R is the number of beams, C the number of columns (firings per revolution), N the number of boxes.
"""

import numpy as np

from qdbev.data.rig import View
from qdbev.geometry import rotation_z
from synthetic.boxes import Boxes

_ELEVATIONS = np.deg2rad(np.linspace(-30.67, 10.67, 32))
"""Angles of the beams above the horizontal, in radians."""
_MAX_RANGE, _MIN_RANGE = 70.0, 1.0
"""Largest and smallest measured range in metres."""
_RANGE_SIGMA = 0.015
"""Standard deviation of the range noise in metres."""
_NOTHING, _GROUND = -2, -1
"""Values used instead of a box's index for rays that hit nothing, or the ground."""


def sweep(view: View, boxes: Boxes, num_columns: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One revolution of the lidar.

    Args:
        boxes: the N boxes that it can hit, global frame.
        num_columns: firings per revolution.
        rng: draws the noise of ranges and intensities.

    Returns:
        Points (P, 5) float32: x, y, z in metres in the lidar frame, intensity 0 to 255, and beam index; and the number of points (N,)
        on each box.
    """
    azimuths = np.linspace(-np.pi, np.pi, num_columns, endpoint=False)
    elevations = _ELEVATIONS[:, None]
    forward, left = np.cos(elevations) * np.cos(azimuths), np.cos(elevations) * np.sin(azimuths)
    rays = np.stack(np.broadcast_arrays(forward, left, np.sin(elevations)), -1)  # (R, C, 3)
    ranges, hits = _cast(view, rays @ view.global_from_sensor.T, azimuths, boxes)
    valid = (hits != _NOTHING) & (ranges < _MAX_RANGE) & (ranges > _MIN_RANGE)
    noisy = ranges[valid] + rng.normal(0, _RANGE_SIGMA, valid.sum())
    ring = np.broadcast_to(np.arange(len(_ELEVATIONS))[:, None], valid.shape)[valid]
    intensity = np.where(hits[valid] >= 0, 40, 12) + rng.integers(0, 10, valid.sum())
    points = np.column_stack([rays[valid] * noisy[:, None], intensity, ring]).astype(np.float32)
    on_box = hits[valid & (hits >= 0)]
    return points, np.bincount(on_box, minlength=len(boxes.yaws))


def _cast(view: View, rays: np.ndarray, azimuths: np.ndarray, boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Range (R, C) along global rays (R, C, 3), and the index of the box that each ray hits (R, C), or `_GROUND`, or `_NOTHING`."""
    with np.errstate(divide="ignore"):
        ranges = np.where(rays[..., 2] < -1e-6, -view.position[2] / rays[..., 2], np.inf)
    hits = np.where(np.isfinite(ranges), _GROUND, _NOTHING)
    for index, (centre, yaw, wlh) in enumerate(zip(*boxes, strict=True)):
        columns = _columns_towards(view, azimuths, centre, wlh)
        box_from_global = rotation_z(yaw).T
        entry = _box_entry(box_from_global @ (view.position - centre), rays[:, columns] @ box_from_global.T, wlh)
        nearer = entry < ranges[:, columns]
        ranges[:, columns] = np.where(nearer, entry, ranges[:, columns])
        hits[:, columns] = np.where(nearer, index, hits[:, columns])
    return ranges, hits


def _columns_towards(view: View, azimuths: np.ndarray, centre: np.ndarray, wlh: np.ndarray) -> np.ndarray:
    """Indices of the columns whose rays may hit a box; none if it is out of range."""
    offset = view.global_from_sensor.T @ (centre - view.position)
    distance, radius = np.hypot(offset[0], offset[1]), np.hypot(wlh[0], wlh[1]) / 2
    if distance - radius > _MAX_RANGE:
        return np.empty(0, dtype=np.int64)
    half = np.pi if distance <= radius + 0.1 else np.arcsin(radius / distance) + 0.01
    difference = (azimuths - np.arctan2(offset[1], offset[0]) + np.pi) % (2 * np.pi) - np.pi
    return np.nonzero(np.abs(difference) <= half)[0]


def _box_entry(origin: np.ndarray, rays: np.ndarray, wlh: np.ndarray) -> np.ndarray:
    """(R, C) range at which rays (R, C, 3) from `origin` (3,) enter a box centred at zero; infinite where they miss it."""
    half = wlh[[1, 0, 2]] / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (-half - origin) / rays, (half - origin) / rays
    entry, leave = np.minimum(first, second).max(-1), np.maximum(first, second).min(-1)
    return np.where((entry < leave) & (entry > 0), entry, np.inf)
