"""Draws one frame: six camera images with projected boxes on the left, the bird's-eye view on the right, a legend below.

All boxes are in the lidar frame (x right, y forward, z up; metres).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
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
"""Colour of each class."""
MOSAIC = {
    "CAM_FRONT": (0, 0),
    "CAM_BACK": (0, 1),
    "CAM_FRONT_LEFT": (1, 0),
    "CAM_FRONT_RIGHT": (1, 1),
    "CAM_BACK_LEFT": (2, 0),
    "CAM_BACK_RIGHT": (2, 1),
}
"""Row and column of each camera's image on the page; cameras on the left of the car are on the left."""
_IMAGE_WIDTH, _FOOTER = 5.2, 0.7
"""Width of a camera image and height of the legend in inches."""
GAP, MARGIN, AXIS, HEADER = 0.08, 0.2, 0.5, 0.6
"""Inches: gap between images, margin of the page, room for the labels of an axis, height of the heading."""
PAPER, INK = "#fbfbf9", "#2b2d42"
"""Colour of the page, and of text and lines."""
TRUTH_FACE, TRUTH_EDGE = "#d9dbe1", "#767b8c"
"""Fill and outline colour of ground truth in the bird's-eye view."""
_CORNERS = np.array([[1, 1, 0], [1, -1, 0], [-1, -1, 0], [-1, 1, 0], [1, 1, 1], [1, -1, 1], [-1, -1, 1], [-1, 1, 1]]) - [0, 0, 0.5]
"""Corners of a box along, across and up, in units of half its length, half its width and its height. The first two of each four corners
are at the front."""
_EDGES = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]])
"""Pairs of corners that an edge connects."""
_NEAR = 0.2
"""Distance in metres in front of a camera at which edges are cut off."""
RING_STEP = 10
"""Metres between two distance rings."""
_EGO_OUTLINE = np.array([[3.1, 0.0], [2.7, 0.87], [-1.0, 0.87], [-1.0, -0.87], [2.7, -0.87]])
"""Outline of the recording car in metres, ego frame, whose origin is on the rear axle."""
_ARROW_SECONDS = 1.0
"""The arrow of an object shows its motion in this time."""
_SLOW = 0.2
"""Speed in metres per second up to which an object gets no arrow."""


class Page:
    """A page on which places are given in inches from its left and upper edge."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=100, facecolor=PAPER)
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes at a place of the page."""
        corner = left / self.width, 1 - (top + height) / self.height
        return self.figure.add_axes((*corner, width / self.width, height / self.height))

    def heading(self, title: str, note: str) -> None:
        """Write the heading: the title on the left, a note on the right."""
        left, right, top = MARGIN / self.width, 1 - MARGIN / self.width, 1 - HEADER / 2 / self.height
        self.figure.text(left, top, title, fontsize=17, color=INK, weight="bold", va="center")
        self.figure.text(right, top, note, fontsize=13, color=INK, ha="right", va="center")

    def legend(self, handles: Sequence[Artist], bottom: float) -> None:
        """Add a row of a legend, `bottom` inches above the lower edge."""
        legend = self.figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(MARGIN / self.width, bottom / self.height),
            ncols=len(handles),
            frameon=False,
            fontsize=11,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.5,
            borderaxespad=0,
        )
        self.figure.add_artist(legend)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of a picture of one frame.

    Attributes:
        title: Text of the heading.
        images: N RGB images (H, W, 3) uint8.
        lidar2img: (N, 4, 4) from the lidar frame to pixels of these images.
        lidar_from_ego: (4, 4) from the ego frame to the lidar frame.
        truth_boxes: Ground truth (G, 9) as in `schema.Frame`.
        boxes, labels: Predictions, (K, 9) and (K,).
        threshold: Lowest score of the predictions.
    """

    title: str
    images: list[np.ndarray]
    lidar2img: np.ndarray
    lidar_from_ego: np.ndarray
    truth_boxes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    threshold: float


def save(path: Path, scene: Scene, pc_range: tuple[float, ...]) -> None:
    """Draw a frame into a PNG file. `pc_range` is the range of the bird's-eye view: x, y, z minimum, then maximum, in metres."""
    height, width = scene.images[0].shape[:2]
    row = _IMAGE_WIDTH * height / width
    side = 3 * row + 2 * GAP  # width and height of the bird's-eye view
    page = Page(3 * MARGIN + 2 * _IMAGE_WIDTH + GAP + AXIS + side, HEADER + side + AXIS + _FOOTER)
    for index, camera in enumerate(CAMERAS):
        line, column = MOSAIC[camera]
        left, top = MARGIN + column * (_IMAGE_WIDTH + GAP), HEADER + line * (row + GAP)
        draw_camera(page.axes(left, top, _IMAGE_WIDTH, row), scene, index, camera)
    draw_bev(page.axes(page.width - MARGIN - side, HEADER, side, side), scene, pc_range)
    counts = f"{len(scene.boxes)} predictions with a score of {scene.threshold:g} or more · {len(scene.truth_boxes)} annotated objects"
    page.heading(scene.title, counts)
    _legend(page)
    page.figure.savefig(path, format="png")


def corners(boxes: np.ndarray) -> np.ndarray:
    """Corners (K, 8, 3) of boxes (K, 9): four at the bottom, then four at the top; the first two of each four are at the front."""
    yaw = -boxes[:, 6] - np.pi / 2  # counter-clockwise from x
    along = _CORNERS[:, 0] * boxes[:, 4:5] / 2  # (K, 8)
    across = _CORNERS[:, 1] * boxes[:, 3:4] / 2
    c, s = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    up = _CORNERS[:, 2] * boxes[:, 5:6]
    return np.stack((c * along - s * across, s * along + c * across, up), -1) + boxes[:, None, :3]


def project_edges(points: np.ndarray, lidar2img: np.ndarray, width: int, height: int) -> dict[int, np.ndarray]:
    """Project the edges of boxes into an image.

    Args:
        points: (K, 8, 3) corners in the lidar frame.
        lidar2img: (4, 4) from the lidar frame to pixels.

    Returns:
        For each box that is visible in the image, by its index, the segments (E, 2, 2) in pixels of its edges in front of the camera.
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


def draw_camera(axes: Axes, scene: Scene, index: int, camera: str) -> None:
    """Draw one camera image with the boxes of ground truth and predictions."""
    image = scene.images[index]
    height, width = image.shape[:2]
    axes.imshow(image, interpolation="lanczos", aspect="auto")
    draw_truth(axes, scene.truth_boxes, scene.lidar2img[index], width, height)
    for k, segments in project_edges(corners(scene.boxes), scene.lidar2img[index], width, height).items():
        color = COLORS[CLASSES[scene.labels[k]]]
        axes.add_collection(LineCollection(segments, colors="black", linewidths=2.6, alpha=0.35))
        axes.add_collection(LineCollection(segments, colors=color, linewidths=1.6))
    frame_image(axes, width, height, camera.removeprefix("CAM_").replace("_", " ").lower())


def draw_truth(axes: Axes, boxes: np.ndarray, lidar2img: np.ndarray, width: int, height: int) -> None:
    """Draw the outlines of the annotated boxes (G, 9) that a camera sees."""
    for segments in project_edges(corners(boxes), lidar2img, width, height).values():
        axes.add_collection(LineCollection(segments, colors="white", linewidths=1.1, linestyles=(0, (3, 2)), alpha=0.9))


def frame_image(axes: Axes, width: int, height: int, label: str) -> None:
    """Limit the axes to the image and write its name into its corner."""
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "boxstyle": "round,pad=0.3"}
    axes.text(0.015, 0.965, label, transform=axes.transAxes, va="top", fontsize=10, color="white", bbox=box)


def draw_bev(axes: Axes, scene: Scene, pc_range: tuple[float, ...]) -> None:
    """Draw the frame from above; the car drives upwards."""
    axes.set_facecolor("white")
    rings(axes, scene.lidar_from_ego, max(pc_range[3:5]))
    shapes(axes, scene.truth_boxes, [TRUTH_EDGE] * len(scene.truth_boxes), face=TRUTH_FACE, width=1.1)
    shapes(axes, scene.boxes, [COLORS[CLASSES[label]] for label in scene.labels], face="none", width=2.0)
    frame_bev(axes, scene.lidar_from_ego, pc_range)


def frame_bev(axes: Axes, lidar_from_ego: np.ndarray, pc_range: tuple[float, ...]) -> None:
    """Draw the own car, and axes in metres that end at `pc_range`."""
    x_min, y_min, _, x_max, y_max, _ = pc_range
    outline = _EGO_OUTLINE @ lidar_from_ego[:2, :2].T + lidar_from_ego[:2, 3]
    axes.add_patch(Polygon(outline, facecolor=INK, edgecolor="none", zorder=3))
    axes.set(xlim=(x_min, x_max), ylim=(y_min, y_max), aspect="equal")
    axes.set_xlabel("right (m)", color=INK, labelpad=1)
    axes.set_ylabel("forward (m)", color=INK, labelpad=0)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.spines[:].set_color("#c8cad3")


def rings(axes: Axes, lidar_from_ego: np.ndarray, reach: float, line: str = "#dfe1e8", ink: str = "#9a9eae") -> None:
    """Draw rings of equal distance from the own car, below the objects. `reach` is the distance in metres up to which they are labelled."""
    center = lidar_from_ego[:2, 3]
    for radius in range(RING_STEP, int(reach * 1.5), RING_STEP):
        axes.add_patch(Circle(center, radius, fill=False, edgecolor=line, linewidth=0.9, zorder=1))
        if radius < reach:
            place = center + radius * np.array((0.7071, -0.7071))
            axes.text(*place, f"{radius} m", fontsize=8, color=ink, ha="center", va="center")


def shapes(axes: Axes, boxes: np.ndarray, edges: list[str], face: str, width: float) -> None:
    """Draw the outlines of boxes from above, with a tick from the centre to the front and an arrow for the motion of one second."""
    if len(boxes) == 0:
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


def _cut(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The ends `a` (E, 3) of edges; those behind the near plane are moved along their edge onto it."""
    behind = a[:, 2] < _NEAR
    share = np.where(behind, (_NEAR - a[:, 2]) / np.where(behind, b[:, 2] - a[:, 2], 1), 0)
    return a + share[:, None] * (b - a)


def _overlaps(segments: np.ndarray, width: int, height: int) -> bool:
    low, high = segments.min((0, 1)), segments.max((0, 1))
    return bool((low < (width, height)).all() and (high > 0).all())


def _legend(page: Page) -> None:
    classes = [Patch(color=color, label=name.replace("_", " ")) for name, color in COLORS.items()]
    marks = [
        Line2D([], [], color=INK, linewidth=2, label="prediction (colour of its class)"),
        Line2D([], [], color="#8a8a8a", linewidth=1.5, linestyle=(0, (3, 2)), label="ground truth in the images (white)"),
        Patch(facecolor=TRUTH_FACE, edgecolor=TRUTH_EDGE, label="ground truth from above"),
        Line2D([], [], color=INK, linewidth=1.6, marker=(3, 0, -90), label=f"motion in {_ARROW_SECONDS:g} s"),
        Line2D([], [], color=INK, linewidth=1.6, label="tick: front"),
        Patch(facecolor=INK, label="own car"),
    ]
    page.legend(classes, 0.42)
    page.legend(marks, 0.14)
