"""Draws solids into an image by the painter's algorithm: far ones first, so that near ones cover them.

N is the number of solids, Q the number of quadrilaterals ("quads") of all solids together. The order is exact for boxes that do not
overlap: a face plane that separates two boxes determines which one can hide the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from qdbev.data.rig import View
from qdbev.geometry import rotation_z
from synthetic.boxes import Boxes, footprints
from synthetic.ground import HAZE, HAZE_PER_METRE, SUBPIXEL_BITS
from synthetic.solids import DECAL_PX_PER_M, Solid

NEAR = 0.3
"""Depth of the near plane in metres. Nothing closer to the camera is drawn."""
SUN = np.array([0.45, 0.35, 0.82]) / np.linalg.norm([0.45, 0.35, 0.82])
"""Unit vector towards the sun, global frame."""
_AMBIENT = 0.5
"""Brightness of a face that is not in the sun, relative to one that faces it."""
_MAX_DISTANCE = 110.0
"""Solids farther away than this, in metres, are not drawn."""
_FAR_PIXEL = 3e4
"""Image coordinates are clipped to plus or minus this, so that they fit OpenCV's fixed-point format."""


@dataclass(frozen=True)
class Quads:
    """The Q quads of all solids, each in the local frame of its solid, so that they do not change with time; see `solids.Quad`."""

    corners: np.ndarray  # (Q, 4, 3) metres
    normals: np.ndarray  # (Q, 3) unit vectors that point outward
    colours: np.ndarray  # (Q, 3)
    block_centres: np.ndarray  # (Q, 3) metres
    is_decal: np.ndarray  # (Q,)
    owner: np.ndarray  # (Q,) index of the solid that each quad belongs to


def gather_quads(solids: Sequence[Solid]) -> Quads:
    """The quads of all solids as arrays. There must be at least one solid."""
    quads = [quad for solid in solids for quad in solid.quads]
    corners, colours, block_centres, is_decal = map(np.array, zip(*quads, strict=True))
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    owner = np.repeat(np.arange(len(solids)), [len(solid.quads) for solid in solids])
    return Quads(corners, normals, colours, block_centres, is_decal, owner)


def paint(image: np.ndarray, view: View, quads: Quads, order: np.ndarray, boxes: Boxes) -> None:
    """Draw the solids with the indices in `order` (far to near) into `image` (H, W, 3), in place."""
    height, width = image.shape[:2]
    polygons, colours = _shaded_polygons(view, quads, order, boxes)
    in_front = (polygons[..., 2] >= NEAR).all(1)
    pixels = project(view, polygons)  # (Q', 4, 2)
    low, high = pixels.min(1), pixels.max(1)
    inside = (high > 0).all(1) & (low[:, 0] < width) & (low[:, 1] < height)
    fixed = to_fixed(pixels)
    for index in np.nonzero(inside | ~in_front)[0]:
        outline = fixed[index] if in_front[index] else to_fixed(project(view, clip_near(polygons[index])))
        cv2.fillConvexPoly(image, outline, colours[index].tolist(), cv2.LINE_AA, SUBPIXEL_BITS)


def visible_order(view: View, image_width: int, boxes: Boxes) -> np.ndarray:
    """Indices of the solids that may appear in the image, far to near."""
    outlines = footprints(*boxes)  # (N, 4, 2)
    offset = outlines - view.position[:2]
    forward, right = view.global_from_sensor[:2, 2], view.global_from_sensor[:2, 0]
    depth = offset @ forward  # (N, 4); the camera is level
    sideways = (offset @ right) * view.intrinsic[0, 0]
    left_edge, right_edge = -view.intrinsic[0, 2], image_width - view.intrinsic[0, 2]
    outside = (sideways < left_edge * depth).all(1) | (sideways > right_edge * depth).all(1) | (depth < NEAR).all(1)
    near = np.linalg.norm(boxes.centres[:, :2] - view.position[:2], axis=1) < _MAX_DISTANCE
    seen = np.nonzero(near & ~outside)[0]
    return seen[_depth_order(outlines[seen], view.position[:2])]


def project(view: View, points: np.ndarray) -> np.ndarray:
    """(..., 2) pixels of points (..., 3) in the camera frame. Points nearer than the near plane are moved onto it."""
    depth = np.maximum(points[..., 2:], NEAR)
    focal, principal = np.diag(view.intrinsic)[:2], view.intrinsic[:2, 2]
    return points[..., :2] / depth * focal + principal


def to_fixed(pixels: np.ndarray) -> np.ndarray:
    """Pixel coordinates as OpenCV's fixed-point integers."""
    return np.round(np.clip(pixels, -_FAR_PIXEL, _FAR_PIXEL) * 2**SUBPIXEL_BITS).astype(np.int32)


def clip_near(polygon: np.ndarray) -> np.ndarray:
    """The part (m, 3) of a polygon (n, 3) in the camera frame that is beyond the near plane; m may be 0."""
    kept = []
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if start[2] >= NEAR:
            kept.append(start)
        if (start[2] >= NEAR) != (end[2] >= NEAR):
            kept.append(start + (end - start) * ((NEAR - start[2]) / (end[2] - start[2])))
    return np.array(kept).reshape(-1, 3)


def _shaded_polygons(view: View, quads: Quads, order: np.ndarray, boxes: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """The Q' quads that face the camera, in drawing order: corners (Q', 4, 3) in the camera frame, and shaded colours (Q', 3)."""
    rank = np.full(len(boxes.yaws), -1)
    rank[order] = np.arange(len(order))
    distance = np.linalg.norm(boxes.centres - view.position, axis=1)
    shows_decals = view.intrinsic[1, 1] / np.maximum(distance, 1.0) > DECAL_PX_PER_M
    chosen = np.nonzero((rank[quads.owner] >= 0) & (~quads.is_decal | shows_decals[quads.owner]))[0]
    owner = quads.owner[chosen]
    rotation, centres = rotation_z(boxes.yaws)[owner], boxes.centres[owner]
    corners = np.einsum("qij,qkj->qki", rotation, quads.corners[chosen]) + centres[:, None]
    normals = np.einsum("qij,qj->qi", rotation, quads.normals[chosen])
    facing = np.einsum("qi,qi->q", normals, view.position - corners[:, 0]) > 1e-6
    block_centres = np.einsum("qij,qj->qi", rotation, quads.block_centres[chosen]) + centres
    block_distance = np.linalg.norm(block_centres - view.position, axis=1)
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
    """Indices of ground outlines (N, 4, 2), far to near as seen from `eye` (2,); of a cycle of outlines, the farthest comes first."""
    distance = np.linalg.norm(outlines.mean(1) - eye, axis=1)
    before = _must_be_drawn_before(outlines, eye) & _overlap_in_azimuth(outlines, eye)
    np.fill_diagonal(before, False)
    num_before = before.sum(0)
    remaining = np.ones(len(outlines), dtype=bool)
    order = []
    while remaining.any():
        free = remaining & (num_before == 0)
        candidates = np.nonzero(free if free.any() else remaining)[0]
        farthest = candidates[np.argmax(distance[candidates])]
        order.append(farthest)
        remaining[farthest] = False
        num_before = num_before - before[farthest]
    return np.array(order, dtype=np.int64)


def _must_be_drawn_before(outlines: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """(N, N) bool, true where the first outline must be drawn before the second, for pairs that are separated by a face."""
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
    """(N, N) bool, true where two outlines cover a common direction as seen from `eye` (2,)."""
    offset = outlines - eye
    angle = np.arctan2(offset[..., 1], offset[..., 0])  # (N, 4)
    relative = (angle - angle[:, :1] + np.pi) % (2 * np.pi) - np.pi
    low, high = angle[:, 0] + relative.min(1), angle[:, 0] + relative.max(1)
    middle, half = (low + high) / 2, (high - low) / 2
    apart = np.abs((middle[:, None] - middle + np.pi) % (2 * np.pi) - np.pi)
    return apart <= half[:, None] + half + 1e-3
