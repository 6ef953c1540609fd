"""Draws solids into an image, far ones first.

N solids, Q quads of all solids together. The order of solids is exact for boxes that do not overlap: a face that separates
two of them decides which may hide the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from qdbev.data.rig import View
from qdbev.geometry import rotation_z
from synthetic.boxes import footprints
from synthetic.ground import HAZE, HAZE_PER_METRE
from synthetic.solids import DECAL_PX_PER_M, Solid

NEAR = 0.3  # metres: nothing is drawn closer to the camera plane
SUN = np.array([0.45, 0.35, 0.82]) / np.linalg.norm([0.45, 0.35, 0.82])  # towards the sun, global frame
_AMBIENT = 0.5
_MAX_DISTANCE = 110.0
SUBPIXEL_BITS = 4
_FAR_PIXEL = 3e4  # image coordinates are cut here, so that they fit OpenCV's fixed point


@dataclass(frozen=True)
class QuadSoup:
    """The quads of all solids in their local frames; does not change with time.

    Attributes:
        corners: (Q, 4, 3).
        normals: (Q, 3), outward, of length one.
        colours: (Q, 3).
        anchors: (Q, 3) centres of the blocks they belong to.
        is_decal: (Q,).
        owner: (Q,) index of the solid.
    """

    corners: np.ndarray
    normals: np.ndarray
    colours: np.ndarray
    anchors: np.ndarray
    is_decal: np.ndarray
    owner: np.ndarray


@dataclass(frozen=True)
class Placement:
    """Where the N solids are: centres (N, 3), yaws (N,) and sizes (N, 3), in the global frame."""

    centres: np.ndarray
    yaws: np.ndarray
    wlh: np.ndarray


def gather_quads(solids: Sequence[Solid]) -> QuadSoup:
    """Join the quads of all solids; at least one solid."""
    corners = np.array([quad for solid in solids for quad in solid.corners])
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0])
    return QuadSoup(
        corners=corners,
        normals=normals / np.linalg.norm(normals, axis=1, keepdims=True),
        colours=np.array([colour for solid in solids for colour in solid.colours], dtype=np.float64),
        anchors=np.array([anchor for solid in solids for anchor in solid.anchors]),
        is_decal=np.array([decal for solid in solids for decal in solid.decal]),
        owner=np.repeat(np.arange(len(solids)), [len(solid.corners) for solid in solids]),
    )


def paint(image: np.ndarray, view: View, quads: QuadSoup, order: np.ndarray, where: Placement) -> None:
    """Draw the solids named in `order` (far to near) into `image` (H, W, 3), in place."""
    height, width = image.shape[:2]
    polygons, colours = _shaded_polygons(view, quads, order, where)
    in_front = (polygons[..., 2] >= NEAR).all(1)
    pixels = project(view, polygons)  # (Q', 4, 2)
    low, high = pixels.min(1), pixels.max(1)
    inside = (high > 0).all(1) & (low[:, 0] < width) & (low[:, 1] < height)
    fixed = to_fixed(pixels)
    for index, colour in enumerate(colours.tolist()):
        if in_front[index]:
            if inside[index]:
                cv2.fillConvexPoly(image, fixed[index], colour, cv2.LINE_AA, SUBPIXEL_BITS)
            continue
        clipped = clip_near(polygons[index])
        if len(clipped) >= 3:
            cv2.fillConvexPoly(image, to_fixed(project(view, clipped)), colour, cv2.LINE_AA, SUBPIXEL_BITS)


def visible_order(view: View, image_width: int, where: Placement) -> np.ndarray:
    """Indices of the solids that may be seen, far to near."""
    outlines = footprints(where.centres, where.yaws, where.wlh)  # (N, 4, 2)
    offset = outlines - view.position[:2]
    forward, right = view.global_from_sensor[:2, 2], view.global_from_sensor[:2, 0]
    depth = offset @ forward  # (N, 4); the camera is level
    sideways = (offset @ right) * view.intrinsic[0, 0]
    left_edge, right_edge = -view.intrinsic[0, 2], image_width - view.intrinsic[0, 2]
    outside = (sideways < left_edge * depth).all(1) | (sideways > right_edge * depth).all(1) | (depth < NEAR).all(1)
    near = np.linalg.norm(where.centres[:, :2] - view.position[:2], axis=1) < _MAX_DISTANCE
    seen = np.nonzero(near & ~outside)[0]
    return seen[_depth_order(outlines[seen], view.position[:2])]


def project(view: View, points: np.ndarray) -> np.ndarray:
    """(..., 2) pixels of camera-frame points (..., 3); points behind the near plane are moved onto it."""
    depth = np.maximum(points[..., 2:], NEAR)
    focal, principal = np.diag(view.intrinsic)[:2], view.intrinsic[:2, 2]
    return points[..., :2] / depth * focal + principal


def to_fixed(pixels: np.ndarray) -> np.ndarray:
    """Pixels as OpenCV's fixed-point integers."""
    return np.round(np.clip(pixels, -_FAR_PIXEL, _FAR_PIXEL) * 2**SUBPIXEL_BITS).astype(np.int32)


def clip_near(polygon: np.ndarray) -> np.ndarray:
    """The part (m, 3) of a camera-frame polygon (n, 3) that lies beyond the near plane; m may be 0."""
    kept = []
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if start[2] >= NEAR:
            kept.append(start)
        if (start[2] >= NEAR) != (end[2] >= NEAR):
            kept.append(start + (end - start) * ((NEAR - start[2]) / (end[2] - start[2])))
    return np.array(kept).reshape(-1, 3)


def _shaded_polygons(view: View, quads: QuadSoup, order: np.ndarray, where: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Camera-frame polygons (Q', 4, 3) that face the camera, in drawing order, and their colours (Q', 3)."""
    rank = np.full(len(where.yaws), -1)
    rank[order] = np.arange(len(order))
    distance = np.linalg.norm(where.centres - view.position, axis=1)
    shows_decals = view.intrinsic[1, 1] / np.maximum(distance, 1.0) > DECAL_PX_PER_M
    chosen = np.nonzero((rank[quads.owner] >= 0) & (~quads.is_decal | shows_decals[quads.owner]))[0]
    owner = quads.owner[chosen]
    turn, centres = rotation_z(where.yaws)[owner], where.centres[owner]
    corners = np.einsum("qij,qkj->qki", turn, quads.corners[chosen]) + centres[:, None]
    normals = np.einsum("qij,qj->qi", turn, quads.normals[chosen])
    facing = np.einsum("qi,qi->q", normals, view.position - corners[:, 0]) > 1e-6
    anchors = np.einsum("qij,qj->qi", turn, quads.anchors[chosen]) + centres
    block_distance = np.linalg.norm(anchors - view.position, axis=1)
    polygons = (corners - view.position) @ view.global_from_sensor
    facing &= (polygons[..., 2] >= NEAR).any(1)
    keys = (-block_distance, quads.is_decal[chosen], rank[owner])
    keep = np.lexsort([key[facing] for key in keys])
    kept = np.nonzero(facing)[0][keep]
    light = _AMBIENT + (1 - _AMBIENT) * np.maximum(0, normals[kept] @ SUN)
    haze = np.clip(HAZE_PER_METRE * polygons[kept][..., 2].mean(1), 0, 0.85)[:, None]
    colours = quads.colours[chosen][kept] * light[:, None] * (1 - haze) + HAZE * haze
    return polygons[kept], np.minimum(colours, 255)


def _depth_order(outlines: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """Order of ground outlines (N, 4, 2), far to near, as seen from `eye` (2,); cycles are broken by distance."""
    distance = np.linalg.norm(outlines.mean(1) - eye, axis=1)
    before = _hiding_graph(outlines, eye) & _overlap_in_azimuth(outlines, eye)
    np.fill_diagonal(before, False)
    waits_for = before.sum(0)
    left = np.ones(len(outlines), dtype=bool)
    order = []
    while left.any():
        free = left & (waits_for == 0)
        candidates = np.nonzero(free if free.any() else left)[0]
        farthest = candidates[np.argmax(distance[candidates])]
        order.append(farthest)
        left[farthest] = False
        waits_for = waits_for - before[farthest]
    return np.array(order, dtype=np.int64)


def _hiding_graph(outlines: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """(N, N) whether the first must be drawn before the second, for pairs that a face separates."""
    edges = np.roll(outlines, -1, axis=1) - outlines
    normals = np.stack([edges[..., 1], -edges[..., 0]], -1)  # (N, 4, 2)
    outward = np.sign(((outlines - outlines.mean(1, keepdims=True)) * normals).sum(-1))
    normals = normals * outward[..., None]
    offsets = (normals * outlines).sum(-1)  # (N, 4)
    beyond = np.einsum("ifk,jck->ifjc", normals, outlines) - offsets[:, :, None, None]
    separates = (beyond >= -1e-6).all(-1)  # (N, 4, N): the second lies beyond this face of the first
    eye_beyond = (normals @ eye - offsets) > 0  # (N, 4)
    second_hides = (separates & eye_beyond[:, :, None]).any(1)
    first_hides = (separates & ~eye_beyond[:, :, None]).any(1)
    before = (second_hides & ~first_hides) | (first_hides & ~second_hides).T
    return before & ~before.T


def _overlap_in_azimuth(outlines: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """(N, N) whether two outlines share a direction as seen from `eye`."""
    offset = outlines - eye
    angle = np.arctan2(offset[..., 1], offset[..., 0])  # (N, 4)
    relative = (angle - angle[:, :1] + np.pi) % (2 * np.pi) - np.pi
    low, high = angle[:, 0] + relative.min(1), angle[:, 0] + relative.max(1)
    middle, half = (low + high) / 2, (high - low) / 2
    apart = np.abs((middle[:, None] - middle + np.pi) % (2 * np.pi) - np.pi)
    return apart <= half[:, None] + half + 1e-3
