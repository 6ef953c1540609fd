"""Estimates which fraction of each box is visible in the six camera images, by drawing the outlines of all boxes into a buffer."""

from collections.abc import Iterable

import cv2
import numpy as np

from qdbev.data.rig import View
from synthetic.boxes import CUBE_FACES
from synthetic.painter import clip_near, project

LEVELS = (("1", "v0-40", 0.0), ("2", "v40-60", 0.4), ("3", "v60-80", 0.6), ("4", "v80-100", 0.8))
"""Token, name and smallest visible fraction of each nuScenes visibility level."""
_BUFFER_WIDTH = 400
"""Width of the buffer in pixels."""


class VisibilityBuffer:
    """Counts the visible pixels and all pixels of each of N boxes over the cameras of one sample."""

    def __init__(self, num_boxes: int, image_hw: tuple[int, int]) -> None:
        height, width = image_hw
        self._scale = _BUFFER_WIDTH / width
        self._hw = (round(height * self._scale), _BUFFER_WIDTH)
        self._visible = np.zeros(num_boxes, dtype=np.int64)
        self._total = np.zeros(num_boxes, dtype=np.int64)

    def add(self, view: View, order: Iterable[int], corners: np.ndarray) -> None:
        """Add the counts of one camera, for the boxes in `order` (indices, far to near), with corners (N, 8, 3) in the global frame."""
        buffer = np.zeros(self._hw, np.int32)
        for index in order:
            points = (corners[index] - view.position) @ view.global_from_sensor
            clipped = np.concatenate([clip_near(points[face]) for face in CUBE_FACES])
            if not len(clipped):
                continue
            pixels = np.clip(project(view, clipped) * self._scale, -1e4, 1e4)
            hull = np.round(cv2.convexHull(pixels.astype(np.float32))).astype(np.int32)
            cv2.fillConvexPoly(buffer, hull, int(index) + 1)
            self._total[index] += cv2.fillConvexPoly(np.zeros(self._hw, np.uint8), hull, 1).sum()
        self._visible += np.bincount(buffer.ravel(), minlength=len(self._visible) + 1)[1:]

    def fractions(self) -> np.ndarray:
        """(N,) fraction of each box's pixels that no nearer box hides; 0 for a box outside all images."""
        return self._visible / np.maximum(self._total, 1)


def level_token(fraction: float) -> str:
    """Token of the nuScenes visibility level of a visible fraction."""
    return [token for token, _, least in LEVELS if fraction >= least][-1]
