"""Draws the inner state of BEVFormer for one frame: the projection of the BEV's pillar points into the images, and the features.

Views from above are in the lidar frame (x right, y forward, z up; metres). N cameras, D heights of a pillar, K BEV cells.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from eval import draw
from eval.draw import AXIS, GAP, HEADER, INK, MARGIN, MOSAIC, RING_STEP, Page
from qdbev import geometry
from qdbev.schema import CAMERAS

_POINTS_WIDTH, _FEATURES_WIDTH = 6.4, 4.4
"""Width of one image in inches on each of the two pages."""
_POINTS_FOOTER, _FEATURES_FOOTER = 0.7, 1.15
"""Height of the legend in inches on each of the two pages."""
_SEAM = 0.04
"""Inches between the feature maps of one image."""
_BAR_HEIGHT, _BAR_WIDTH = 0.16, 3.6
"""Height and width of a colour bar in inches."""
_SPACING = 4.0
"""Approximate distance in metres between two drawn pillars; the network has more."""
_RING_ANGLES = np.linspace(-np.pi, np.pi, 1441)
"""Angles of the points of a distance ring in radians."""
_RING_COLOR = "#8ef9f3"
_HEAT = matplotlib.colormaps["inferno"]
_HEIGHTS = matplotlib.colormaps["spring"]
_SEEN_BY = ("#e9eaee", "#a8c7e6", "#4f8fc6", "#1d4f8b", "#0b2545")
"""Colour of a cell for each number of cameras that see it; the last colour is also for all larger numbers."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """The content of the pictures of one frame.

    Attributes:
        images: N images (H, W, 3) uint8 RGB: the network's input as colours, padding included.
        scaled_hw: Height and width of the part of an image that is not padding.
        lidar2img: (N, 4, 4) from the lidar frame to pixels of `images`.
        pillars: (D, K, 3) points of the pillars in metres.
        points: (N, K, D, 2) projected points as a share of the image's width and height, 0 to 1.
        visible: (N, K, D) bool, whether a camera sees a point.
        features: For each level (N, h, w), the norm over the channels of the neck's output.
        bev: (rows, columns), the distance of a cell's features from the mean over all cells.
    """

    title: str
    images: list[np.ndarray]
    scaled_hw: tuple[int, int]
    lidar2img: np.ndarray
    lidar_from_ego: np.ndarray
    truth_boxes: np.ndarray
    pc_range: tuple[float, ...]
    pillars: np.ndarray
    points: np.ndarray
    visible: np.ndarray
    features: list[np.ndarray]
    bev: np.ndarray


def save_points(path: Path, views: Views) -> None:
    """Draw the geometry into a PNG file: pillar points and distance rings in the images, and the number of cameras that see each cell."""
    row = _POINTS_WIDTH * _aspect(views)
    side = 3 * row + 2 * GAP
    page = Page(3 * MARGIN + 2 * _POINTS_WIDTH + GAP + AXIS + side, HEADER + side + AXIS + _POINTS_FOOTER)
    for index, camera in enumerate(CAMERAS):
        line, column = MOSAIC[camera]
        left, top = MARGIN + column * (_POINTS_WIDTH + GAP), HEADER + line * (row + GAP)
        draw_points(page.axes(left, top, _POINTS_WIDTH, row), views, index, camera)
    draw_coverage(page.axes(page.width - MARGIN - side, HEADER, side, side), views)
    unseen = 1 - views.visible.any((0, 2)).mean()
    note = f"BEV {views.bev.shape[0]} x {views.bev.shape[1]} · {unseen:.1%} of the cells are seen by no camera"
    page.heading(f"{views.title} · reference points of the BEV pillars", note)
    _points_legend(page, views)
    page.figure.savefig(path, format="png")


def save_features(path: Path, views: Views) -> None:
    """Draw the features into a PNG file: the feature maps beside each image, and the BEV features from above."""
    row = _FEATURES_WIDTH * _aspect(views)
    side = 3 * row + 2 * GAP
    down = math.ceil(math.sqrt(len(views.features)))  # number of maps in a column beside an image
    across = math.ceil(len(views.features) / down)
    high = (row - (down - 1) * _SEAM) / down
    wide = high / _aspect(views)
    block = _FEATURES_WIDTH + across * (wide + _SEAM) + GAP
    page = Page(3 * MARGIN + 2 * block + AXIS + side, HEADER + side + AXIS + _FEATURES_FOOTER)
    scales = [_scale(level) for level in views.features]
    for index, camera in enumerate(CAMERAS):
        line, column = MOSAIC[camera]
        left, top = MARGIN + column * block, HEADER + line * (row + GAP)
        draw_input(page.axes(left, top, _FEATURES_WIDTH, row), views, index, camera)
        for level, scale in enumerate(scales):
            beside, below = level // down * (wide + _SEAM), level % down * (high + _SEAM)
            draw_features(page.axes(left + _FEATURES_WIDTH + _SEAM + beside, top + below, wide, high), views, index, level, scale)
    heat = draw_bev(page.axes(page.width - MARGIN - side, HEADER, side, side), views)
    page.heading(f"{views.title} · features", "one scale for all cameras of a level · a dashed line is where the padding begins")
    for level, scale in enumerate(scales):
        place = MARGIN + level * (2 * block / max(len(scales), 2))
        rows, columns = views.features[level].shape[1:]
        _bar(page, place, ScalarMappable(scale, _HEAT), f"level {level}, {rows} x {columns}: norm over the channels")
    _bar(page, page.width - MARGIN - side, heat, "BEV: distance of a cell's features from the mean cell's")
    page.figure.savefig(path, format="png")


def draw_points(axes: Axes, views: Views, index: int, camera: str) -> None:
    """Draw one camera's input with annotated boxes, rings on the ground, and the visible points of every n-th pillar."""
    height, width = views.images[index].shape[:2]
    draw_input(axes, views, index, camera)
    draw.draw_truth(axes, views.truth_boxes, views.lidar2img[index], width, height)
    _ground_rings(axes, views, index)
    cells = thinned(views)
    distance = np.hypot(*views.pillars[0, cells, :2].T)
    size = (260 / distance.clip(5)).clip(3, 30)  # points^2; nearer is larger
    for level, color in enumerate(_HEIGHTS(np.linspace(0, 1, len(views.pillars)))):
        seen = views.visible[index, cells, level]
        u, v = (views.points[index, cells, level][seen] * (width, height)).T
        axes.scatter(u, v, s=size[seen], color=color, edgecolors="black", linewidths=0.3, zorder=2.5)


def draw_input(axes: Axes, views: Views, index: int, camera: str) -> None:
    """Draw one camera's input with a dashed line where the padding begins."""
    height, width = views.images[index].shape[:2]
    axes.imshow(views.images[index], interpolation="lanczos", aspect="auto")
    _padding(axes, views)
    draw.frame_image(axes, width, height, camera.removeprefix("CAM_").replace("_", " ").lower())


def draw_coverage(axes: Axes, views: Views) -> None:
    """Draw from above how many cameras see each cell at one height or more, and the annotated objects."""
    counts = seen_by(views).clip(max=len(_SEEN_BY) - 1)
    _from_above(axes, views, counts, cmap=ListedColormap(_SEEN_BY), vmin=-0.5, vmax=len(_SEEN_BY) - 0.5)
    axes.scatter(*views.pillars[0, thinned(views), :2].T, s=3, color=INK, linewidths=0, zorder=2)
    draw.rings(axes, views.lidar_from_ego, max(views.pc_range[3:5]), line="white", ink=INK)
    draw.shapes(axes, views.truth_boxes, ["#e4572e"] * len(views.truth_boxes), face="none", width=1.3)
    draw.frame_bev(axes, views.lidar_from_ego, views.pc_range)


def draw_features(axes: Axes, views: Views, index: int, level: int, scale: Normalize) -> None:
    """Draw one feature map, as wide and high as its image."""
    height, width = views.images[index].shape[:2]
    axes.imshow(views.features[level][index], cmap=_HEAT, norm=scale, interpolation="nearest", extent=(0, width, height, 0), aspect="auto")
    _padding(axes, views)
    draw.frame_image(axes, width, height, f"level {level}")


def draw_bev(axes: Axes, views: Views) -> ScalarMappable:
    """Draw the BEV features from above with the annotated objects; returns the colours for a colour bar."""
    heat = _from_above(axes, views, views.bev, cmap=_HEAT, norm=_scale(views.bev))
    draw.rings(axes, views.lidar_from_ego, max(views.pc_range[3:5]), line="#ffffff80", ink="white")
    draw.shapes(axes, views.truth_boxes, ["white"] * len(views.truth_boxes), face="none", width=1.0)
    draw.frame_bev(axes, views.lidar_from_ego, views.pc_range)
    return heat


def seen_by(views: Views) -> np.ndarray:
    """Number of cameras that see each cell at one height or more, (rows, columns)."""
    return views.visible.any(2).sum(0).reshape(views.bev.shape)


def thinned(views: Views) -> np.ndarray:
    """Indices of the cells that are drawn: every n-th row and column, so that they are about `_SPACING` metres apart."""
    rows, columns = views.bev.shape
    x_min, y_min, _, x_max, y_max, _ = views.pc_range
    step = [max(1, round(_SPACING * count / reach)) for count, reach in ((rows, y_max - y_min), (columns, x_max - x_min))]
    grid = np.arange(rows * columns).reshape(rows, columns)
    return grid[step[0] // 2 :: step[0], step[1] // 2 :: step[1]].ravel()


def ground_ring(radius: float, lidar_from_ego: np.ndarray) -> np.ndarray:
    """Points (R, 3) in the lidar frame of a closed circle on the ground around the own car's origin."""
    x, y = radius * np.cos(_RING_ANGLES), radius * np.sin(_RING_ANGLES)
    return (np.stack((x, y, np.zeros_like(x), np.ones_like(x)), -1) @ lidar_from_ego.T)[:, :3]


def _aspect(views: Views) -> float:
    height, width = views.images[0].shape[:2]
    return height / width


def _scale(values: np.ndarray) -> Normalize:
    """Range of the colours: the 1st to the 99th percentile, so that a few extreme cells do not use up all colours."""
    return Normalize(*np.percentile(values, (1, 99)))


def _ground_rings(axes: Axes, views: Views, index: int) -> None:
    """Draw the distance rings on the ground in a camera image; their labels are spread over the width so that they do not overlap."""
    height, width = views.images[index].shape[:2]
    radii = range(RING_STEP, int(max(views.pc_range[3:5])), RING_STEP)
    lidar2img = torch.from_numpy(views.lidar2img[None, None, index])
    for number, radius in enumerate(radii):
        circle = torch.from_numpy(ground_ring(radius, views.lidar_from_ego)).float()
        uv, visible = geometry.project(circle[None], lidar2img, (height, width))
        pixels = uv[0, 0, :, 0].numpy() * (width, height)  # (R, 2)
        seen = visible[0, 0, :, 0].numpy()
        segments = np.stack((pixels[:-1], pixels[1:]), 1)[seen[:-1] & seen[1:]]
        axes.add_collection(LineCollection(segments, colors=_RING_COLOR, linewidths=1.3, alpha=0.9, zorder=2))
        if seen.any():
            wanted = width * (number + 1) / (len(radii) + 1)
            place = pixels[seen][np.abs(pixels[seen, 0] - wanted).argmin()]
            effect = [withStroke(linewidth=2.2, foreground="black")]
            axes.text(*place, f"{radius} m", fontsize=9, color=_RING_COLOR, ha="center", va="center", path_effects=effect, zorder=4)


def _padding(axes: Axes, views: Views) -> None:
    height, width = views.images[0].shape[:2]
    style = {"color": "white", "linewidth": 1.0, "linestyle": (0, (6, 3))}
    if views.scaled_hw[0] < height:
        axes.axhline(views.scaled_hw[0], **style)
    if views.scaled_hw[1] < width:
        axes.axvline(views.scaled_hw[1], **style)


def _from_above(axes: Axes, views: Views, grid: np.ndarray, **style: object) -> ScalarMappable:
    """Draw a grid (rows, columns) from above, with its first row at the bottom."""
    x_min, y_min, _, x_max, y_max, _ = views.pc_range
    return axes.imshow(grid, origin="lower", extent=(x_min, x_max, y_min, y_max), interpolation="nearest", zorder=0, **style)


def _points_legend(page: Page, views: Views) -> None:
    heights = views.pillars[:, 0, 2]
    colors = _HEIGHTS(np.linspace(0, 1, len(heights)))
    style = {"linestyle": "none", "marker": "o", "markeredgecolor": "black", "markeredgewidth": 0.4, "markersize": 8}
    points = [Line2D([], [], color=color, label=f"z = {z:.2f} m", **style) for z, color in zip(heights, colors, strict=True)]
    most = min(int(seen_by(views).max()), len(_SEEN_BY) - 1)
    cells = [Patch(color=_SEEN_BY[count], label=f"cameras that see a cell: {count}") for count in range(most + 1)]
    marks: list[Artist] = [
        Line2D([], [], color=_RING_COLOR, linewidth=2, label="distance on the ground, from the own car's origin"),
        Line2D([], [], color="#8a8a8a", linewidth=1.5, linestyle=(0, (3, 2)), label="annotated object in the images (white)"),
        Patch(facecolor="none", edgecolor="#e4572e", label="annotated object from above"),
        Line2D([], [], color="#8a8a8a", linewidth=1.5, linestyle=(0, (6, 3)), label="padding begins"),
        Patch(facecolor=INK, label="own car"),
    ]
    ground = (views.lidar_from_ego @ (0, 0, 0, 1))[2]
    note = Line2D([], [], linestyle="none", label=f"heights are above the lidar; the ground under the car is at z = {ground:.2f} m")
    page.legend([*points, note, *cells], 0.42)
    page.legend(marks, 0.14)


def _bar(page: Page, left: float, heat: ScalarMappable, label: str) -> None:
    axes = page.axes(left, page.height - 0.62, _BAR_WIDTH, _BAR_HEIGHT)
    bar = page.figure.colorbar(heat, cax=axes, orientation="horizontal", extend="both")
    bar.outline.set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.set_title(label, fontsize=11, color=INK, loc="left", pad=4)
