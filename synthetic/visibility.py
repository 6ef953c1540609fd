"""Estimates which fraction of each box is visible in the six camera images, by drawing the outlines of all boxes into a buffer."""

from collections.abc import Iterable

import cv2
import numpy as np

from qdbev.data.rig import View
from synthetic.boxes import CUBE_FACES, Boxes, box_corners
from synthetic.painter import clip_near, project

LEVELS = (("1", "v0-40", 0.0), ("2", "v40-60", 0.4), ("3", "v60-80", 0.6), ("4", "v80-100", 0.8))
"""Token, name and smallest visible fraction of each nuScenes visibility level."""
_BUFFER_WIDTH = 400
"""Width of the buffer in pixels."""


def count_pixels(view: View, image_hw: tuple[int, int], order: Iterable[int], boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of pixels of N boxes in one camera: those that no nearer box hides (N,), and all (N,); `order` is far to near."""
    height, width = image_hw
    scale = _BUFFER_WIDTH / width
    buffer_hw = (round(height * scale), _BUFFER_WIDTH)
    buffer = np.zeros(buffer_hw, np.int32)
    total = np.zeros(len(boxes.yaws), np.int64)
    corners = box_corners(*boxes)
    for index in order:
        points = (corners[index] - view.position) @ view.global_from_sensor
        clipped = np.concatenate([clip_near(points[face]) for face in CUBE_FACES])
        if not len(clipped):
            continue
        pixels = np.clip(project(view, clipped) * scale, -1e4, 1e4)
        hull = np.round(cv2.convexHull(pixels.astype(np.float32))).astype(np.int32)
        cv2.fillConvexPoly(buffer, hull, int(index) + 1)
        total[index] = cv2.fillConvexPoly(np.zeros(buffer_hw, np.uint8), hull, 1).sum()
    return np.bincount(buffer.ravel(), minlength=len(total) + 1)[1:], total


def level_token(fraction: float) -> str:
    """Token of the nuScenes visibility level of a visible fraction."""
    return [token for token, _, least in LEVELS if fraction >= least][-1]
