"""Rotations about the vertical and the corners of boxes. N boxes; `wlh` is width, length, height."""

import numpy as np

CUBE = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
CUBE_FACES = np.array([[4, 6, 7, 5], [0, 1, 3, 2], [2, 3, 7, 6], [0, 4, 5, 1], [1, 5, 7, 3], [0, 2, 6, 4]])


def rotation_z(yaw: np.ndarray | float) -> np.ndarray:
    """(..., 3, 3) rotations by `yaw` (...) about the z axis."""
    yaw = np.asarray(yaw, dtype=np.float64)
    cos, sin, zero, one = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw), np.ones_like(yaw)
    rows = [np.stack(row, -1) for row in ((cos, -sin, zero), (sin, cos, zero), (zero, zero, one))]
    return np.stack(rows, -2)


def footprints(centres: np.ndarray, yaws: np.ndarray, wlh: np.ndarray) -> np.ndarray:
    """Ground outline of boxes.

    Args:
        centres: (..., 2 or 3) box centres; only x and y are read.
        yaws: (...) headings.
        wlh: (..., 3) sizes.

    Returns:
        (..., 4, 2) corners in order around the box, in the frame of `centres`.
    """
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    local = signs * np.asarray(wlh)[..., None, [1, 0]]  # (..., 4, 2)
    turn = rotation_z(yaws)[..., :2, :2]
    return np.einsum("...ij,...kj->...ki", turn, local) + np.asarray(centres)[..., None, :2]


def box_corners(centres: np.ndarray, yaws: np.ndarray, wlh: np.ndarray) -> np.ndarray:
    """(N, 8, 3) corners of boxes, in the order of `CUBE`, from centres (N, 3), yaws (N,) and sizes (N, 3)."""
    local = CUBE * np.asarray(wlh)[:, None, [1, 0, 2]]  # (N, 8, 3)
    return np.einsum("nij,nkj->nki", rotation_z(yaws), local) + np.asarray(centres)[:, None]


def outlines_overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether rectangles overlap, by separating axes; outlines (..., 4, 2) broadcast, the result is (...)."""
    apart = np.zeros(np.broadcast_shapes(first.shape[:-2], second.shape[:-2]), dtype=bool)
    for outline in (first, second):
        for corner in (1, 3):
            axis = outline[..., corner, :] - outline[..., 0, :]
            spans = [np.einsum("...kj,...j->...k", other, axis) for other in np.broadcast_arrays(first, second)]
            apart |= (spans[0].max(-1) < spans[1].min(-1)) | (spans[1].max(-1) < spans[0].min(-1))
    return ~apart
