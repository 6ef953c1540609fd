"""Draws one frame: six camera images with projected boxes on the left, the bird's-eye view on the right, one legend below.

Predictions have their class's colour; ground truth is a pale dashed outline in the images and a grey shape from above. Everything is in
the lidar frame (x right, y forward, z up; metres).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Polygon

from qdbev.schema import CAMERAS, CLASSES

COLORS = {
    "car": "#ff9f1c",
    "truck": "#e4572e",
    "construction_vehicle": "#c1121f",
    "bus": "#ff5d8f",
    "trailer": "#b5651d",
    "barrier": "#8d99ae",
    "motorcycle": "#9b5de5",
    "bicycle": "#00b4d8",
    "pedestrian": "#3a86ff",
    "traffic_cone": "#2ec4b6",
}
_MOSAIC = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
_PAPER = "#fbfbf9"
_INK = "#2b2d42"
_TRUTH_FACE, _TRUTH_EDGE = "#d9dbe1", "#767b8c"
_CORNERS = np.array([[1, 1, 0], [1, -1, 0], [-1, -1, 0], [-1, 1, 0], [1, 1, 1], [1, -1, 1], [-1, -1, 1], [-1, 1, 1]]) - [0, 0, 0.5]
"""Along, across and up: half lengths, half widths, whole heights. The first two of each four are the front."""
_EDGES = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]])
_NEAR = 0.2
"""Metres in front of a camera where edges are cut off."""
_RING_STEP = 10
_EGO_OUTLINE = np.array([[3.1, 0.0], [2.7, 0.87], [-1.0, 0.87], [-1.0, -0.87], [2.7, -0.87]])
"""Ego frame, metres: the recording car, with its origin on the rear axle."""
_ARROW_SECONDS = 1.0
_SLOW = 0.2


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One frame to draw: N RGB images (H, W, 3) uint8, lidar2img (N, 4, 4) for them, boxes (K, 9) as in `schema.Frame`."""

    title: str
    images: list[np.ndarray]
    lidar2img: np.ndarray
    lidar_from_ego: np.ndarray
    truth_boxes: np.ndarray
    truth_labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    threshold: float


def save(path: Path, scene: Scene, pc_range: tuple[float, ...]) -> None:
    """Draw a scene into a PNG file."""
    height, width = scene.images[0].shape[:2]
    figure = Figure(figsize=(19.2, 3.84 * 3 * height / width + 2.4), dpi=100, facecolor=_PAPER)
    FigureCanvasAgg(figure)
    margins = {"left": 0.012, "right": 0.988, "top": 0.925, "bottom": 0.135, "wspace": 0.025, "hspace": 0.025}
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.42), **margins)
    for place, camera in enumerate(_MOSAIC):
        axes = figure.add_subplot(grid[place // 3, place % 3])
        index = CAMERAS.index(camera)
        draw_camera(axes, scene, index, camera)
    draw_bev(figure.add_subplot(grid[:, 3]), scene, pc_range)
    figure.text(0.012, 0.955, scene.title, fontsize=15, color=_INK, weight="bold")
    counts = f"{len(scene.boxes)} predictions with a score of {scene.threshold:g} or more · {len(scene.truth_boxes)} annotated objects"
    figure.text(0.988, 0.955, counts, fontsize=12, color=_INK, ha="right")
    _legend(figure)
    figure.savefig(path, format="png")


def corners(boxes: np.ndarray) -> np.ndarray:
    """(K, 8, 3) corners of (K, 9) boxes: four at the bottom, four at the top, the first two of each at the front."""
    yaw = -boxes[:, 6] - np.pi / 2  # counter-clockwise from x
    along = _CORNERS[:, 0] * boxes[:, 4:5] / 2  # (K, 8)
    across = _CORNERS[:, 1] * boxes[:, 3:4] / 2
    c, s = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    up = _CORNERS[:, 2] * boxes[:, 5:6]
    return np.stack((c * along - s * across, s * along + c * across, up), -1) + boxes[:, None, :3]


def draw_camera(axes: Axes, scene: Scene, index: int, camera: str) -> None:
    """One camera image with the boxes of ground truth and predictions."""
    image = scene.images[index]
    height, width = image.shape[:2]
    axes.imshow(image, interpolation="lanczos", aspect="auto")
    truth = _project(corners(scene.truth_boxes), scene.lidar2img[index], width, height)
    for segments in truth.values():
        axes.add_collection(LineCollection(segments, colors="white", linewidths=1.1, linestyles=(0, (3, 2)), alpha=0.9))
    for k, segments in _project(corners(scene.boxes), scene.lidar2img[index], width, height).items():
        color = COLORS[CLASSES[scene.labels[k]]]
        axes.add_collection(LineCollection(segments, colors="black", linewidths=2.6, alpha=0.35))
        axes.add_collection(LineCollection(segments, colors=color, linewidths=1.6))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    label = camera.removeprefix("CAM_").replace("_", " ").lower()
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "boxstyle": "round,pad=0.3"}
    axes.text(0.015, 0.965, label, transform=axes.transAxes, va="top", fontsize=10, color="white", bbox=box)


def draw_bev(axes: Axes, scene: Scene, pc_range: tuple[float, ...]) -> None:
    """The frame from above, forward up."""
    x_min, y_min, _, x_max, y_max, _ = pc_range
    axes.set_facecolor("white")
    _rings(axes, scene.lidar_from_ego, max(x_max, y_max))
    _shapes(axes, scene.truth_boxes, [_TRUTH_EDGE] * len(scene.truth_boxes), face=_TRUTH_FACE, width=1.1)
    _shapes(axes, scene.boxes, [COLORS[CLASSES[label]] for label in scene.labels], face="none", width=2.0)
    axes.set(xlim=(x_min, x_max), ylim=(y_min, y_max), aspect="equal")
    axes.set_xlabel("right (m)", color=_INK, labelpad=1)
    axes.set_ylabel("forward (m)", color=_INK, labelpad=0)
    axes.tick_params(colors=_INK, labelsize=9, length=3)
    axes.spines[:].set_color("#c8cad3")


def _rings(axes: Axes, lidar_from_ego: np.ndarray, reach: float) -> None:
    center = lidar_from_ego[:2, 3]
    for radius in range(_RING_STEP, int(reach * 1.5), _RING_STEP):
        axes.add_patch(Circle(center, radius, fill=False, edgecolor="#dfe1e8", linewidth=0.9, zorder=0))
        if radius < reach:
            place = center + radius * np.array((0.7071, -0.7071))
            axes.text(*place, f"{radius} m", fontsize=8, color="#9a9eae", ha="center", va="center")
    outline = _EGO_OUTLINE @ lidar_from_ego[:2, :2].T + center
    axes.add_patch(Polygon(outline, facecolor=_INK, edgecolor="none", zorder=3))


def _shapes(axes: Axes, boxes: np.ndarray, edges: list[str], face: str, width: float) -> None:
    """Outlines with a tick from the centre over the front, and the way each object makes in a second."""
    if not len(boxes):
        return
    ground = corners(boxes)[:, :4, :2]
    axes.add_collection(PolyCollection(ground, facecolors=face, edgecolors=edges, linewidths=width, zorder=2))
    centers, fronts = boxes[:, :2], ground[:, :2].mean(1)
    ticks = np.stack((centers, centers + 1.3 * (fronts - centers)), 1)
    axes.add_collection(LineCollection(ticks, colors=edges, linewidths=width, zorder=2))
    moving = np.hypot(boxes[:, 7], boxes[:, 8]) > _SLOW
    if moving.any():
        way = boxes[moving, 7:9] * _ARROW_SECONDS
        colors = [edge for edge, moves in zip(edges, moving, strict=True) if moves]
        axes.quiver(*centers[moving].T, *way.T, angles="xy", scale_units="xy", scale=1, color=colors, width=0.004, headwidth=4.5, zorder=3)


def _project(points: np.ndarray, lidar2img: np.ndarray, width: int, height: int) -> dict[int, np.ndarray]:
    """Box number -> (E, 2, 2) pixel segments of those edges that lie in front of the camera, for boxes seen in the image.

    Args:
        points: (K, 8, 3) corners in the lidar frame.
    """
    homogeneous = np.concatenate((points, np.ones((*points.shape[:2], 1))), -1)
    cam = homogeneous @ lidar2img[:3].T  # (K, 8, 3): u * depth, v * depth, depth
    seen = {}
    for k, box in enumerate(cam):
        a, b = box[_EDGES[:, 0]], box[_EDGES[:, 1]]
        front = (a[:, 2] > _NEAR) | (b[:, 2] > _NEAR)
        a, b = a[front], b[front]
        a, b = _cut(a, b), _cut(b, a)
        segments = np.stack((a[:, :2] / a[:, 2:], b[:, :2] / b[:, 2:]), 1)  # (E, 2, 2)
        if len(segments) and _overlaps(segments, width, height):
            seen[k] = segments
    return seen


def _cut(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(E, 3) ends `a`, moved along the edge to the near plane where they lie behind it."""
    behind = a[:, 2] < _NEAR
    share = np.where(behind, (_NEAR - a[:, 2]) / np.where(behind, b[:, 2] - a[:, 2], 1), 0)
    return a + share[:, None] * (b - a)


def _overlaps(segments: np.ndarray, width: int, height: int) -> bool:
    low, high = segments.min((0, 1)), segments.max((0, 1))
    return bool(low[0] < width and high[0] > 0 and low[1] < height and high[1] > 0)


def _legend(figure: Figure) -> None:
    classes = [Line2D([], [], color=color, linewidth=3, label=name.replace("_", " ")) for name, color in COLORS.items()]
    truth = [
        Patch(facecolor=_TRUTH_FACE, edgecolor=_TRUTH_EDGE, label="ground truth (from above)"),
        Line2D([], [], color="#8a8a8a", linewidth=1.5, linestyle=(0, (3, 2)), label="ground truth (images: white)"),
        Patch(facecolor=_INK, label="own car"),
        Line2D([], [], color=_INK, linewidth=1.6, marker=(3, 0, -90), label=f"arrow: way in {_ARROW_SECONDS:g} s, tick: front"),
    ]
    style = {"frameon": False, "fontsize": 10.5, "labelcolor": _INK, "handlelength": 1.8, "columnspacing": 1.6, "borderaxespad": 0}
    figure.add_artist(figure.legend(handles=classes, loc="lower left", bbox_to_anchor=(0.012, 0.055), ncols=10, **style))
    figure.legend(handles=truth, loc="lower left", bbox_to_anchor=(0.012, 0.012), ncols=4, **style)
