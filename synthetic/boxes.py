"""Boxes that are rotated about the vertical axis, their corners and their ground outlines."""

from typing import NamedTuple

import numpy as np

from qdbev.geometry import rotation_z

CUBE = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
"""(8, 3) corners of a cube of side one around the origin."""
CUBE_FACES = np.array([[4, 6, 7, 5], [0, 1, 3, 2], [2, 3, 7, 6], [0, 4, 5, 1], [1, 5, 7, 3], [0, 2, 6, 4]])
"""(6, 4) indices into `CUBE` of the corners of each face, counter-clockwise seen from outside."""


class Boxes(NamedTuple):
    """N boxes: centres (N, 3) in metres, headings (N,) in radians, and width, length and height (N, 3) in metres."""

    centres: np.ndarray
    yaws: np.ndarray
    wlh: np.ndarray


def footprints(centres: np.ndarray, yaws: np.ndarray, wlh: np.ndarray) -> np.ndarray:
    """(..., 4, 2) ground outlines of boxes, corners in order, from centres (..., 2 or 3), headings (...) in radians and sizes (..., 3)."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    local = signs * np.asarray(wlh)[..., None, [1, 0]]  # (..., 4, 2)
    rotation = rotation_z(yaws)[..., :2, :2]
    return np.einsum("...ij,...kj->...ki", rotation, local) + np.asarray(centres)[..., None, :2]


def box_corners(centres: np.ndarray, yaws: np.ndarray, wlh: np.ndarray) -> np.ndarray:
    """(N, 8, 3) corners of boxes, in the order of `CUBE`, from centres (N, 3), headings (N,) in radians and sizes (N, 3)."""
    local = CUBE * np.asarray(wlh)[:, None, [1, 0, 2]]  # (N, 8, 3)
    return np.einsum("nij,nkj->nki", rotation_z(yaws), local) + np.asarray(centres)[:, None]


def outlines_overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (...) bool, true where two rectangles (..., 4, 2) overlap, by the separating axis test; the outlines are broadcast."""
    apart = np.zeros(np.broadcast_shapes(first.shape[:-2], second.shape[:-2]), dtype=bool)
    for outline in (first, second):
        for corner in (1, 3):
            axis = outline[..., corner, :] - outline[..., 0, :]
            spans = [np.einsum("...kj,...j->...k", other, axis) for other in np.broadcast_arrays(first, second)]
            apart |= (spans[0].max(-1) < spans[1].min(-1)) | (spans[1].max(-1) < spans[0].min(-1))
    return ~apart
