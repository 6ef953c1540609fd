"""Renders camera images of a scene: sky, ground, houses, shadows, objects and sensor noise. Colours are blue, green, red."""

from collections.abc import Collection

import cv2
import numpy as np

from qdbev.data.rig import View
from qdbev.schema import CAMERAS
from synthetic.boxes import Boxes, footprints
from synthetic.ground import HAZE, SUBPIXEL_BITS, Ground
from synthetic.painter import SUN, clip_near, gather_quads, paint, project, to_fixed, visible_order
from synthetic.street import Street

_ZENITH = np.array([205.0, 150.0, 105.0])
"""Colour of the sky at the top of the image."""
_SHADOW_HEIGHT = 2.5
"""Largest height in metres for shadows; those of taller objects would cross the road."""
_SHADOW_REACH = 60.0
"""Objects farther from the camera than this, in metres, have no shadow."""
_SHADOW_STRENGTH = 127
"""Decrease of brightness in a shadow, from 0 (none) to 255 (black)."""
_GAIN_RANGE = (0.92, 1.08)
"""Range from which the brightness factor of each camera is drawn."""
_NOISE_SIGMA = 3.0
"""Standard deviation of the sensor noise in grey levels."""


class Renderer:
    """Renders the camera images of one street. Images do not depend on which others are rendered, or in which order."""

    def __init__(self, street: Street) -> None:
        height, width = street.config.image_hw
        rng = street.rng(1)
        self.street = street
        self._ground = Ground(street, rng)
        down = np.linspace(0, 1, height)[:, None, None] ** 0.8
        self._sky = np.broadcast_to(_ZENITH * (1 - down) + HAZE * down, (height, width, 3)).astype(np.uint8)
        self._noise = rng.normal(0, _NOISE_SIGMA, (height + 64, width + 64, 3)).astype(np.int16)
        self._quads = gather_quads([actor.solid for actor in street.actors])
        self._house_quads = gather_quads(street.house_solids) if street.house_solids else None

    def image(self, channel: str, frame: int, skip: Collection[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Render the image of a camera at a key frame.

        Args:
            skip: indices of actors that are not drawn; their shadows are.

        Returns:
            Image (H, W, 3) uint8 in blue, green, red; and the indices of the actors that may appear in it, far to near.
        """
        view, t = self.street.view(channel, frame)
        image = self._sky.copy()
        height, width = image.shape[:2]
        self._ground.draw(image, view)
        if self._house_quads is not None:
            houses = self.street.houses
            paint(image, view, self._house_quads, visible_order(view, width, houses), houses)
        actors = self.street.actor_boxes(t)
        _cast_shadows(image, view, actors)
        order = visible_order(view, width, actors)
        paint(image, view, self._quads, order[~np.isin(order, list(skip))], actors)

        number = CAMERAS.index(channel)
        gain = self.street.rng(2, number).uniform(*_GAIN_RANGE)
        top, left = self.street.rng(3, number, frame).integers(0, 65, 2)
        noise = self._noise[top : top + height, left : left + width]
        return cv2.add(cv2.convertScaleAbs(image, alpha=gain), noise, dtype=cv2.CV_8U), order


def _cast_shadows(image: np.ndarray, view: View, actors: Boxes) -> None:
    """Darken the ground in the shadows of the actors, in place."""
    height, width = image.shape[:2]
    mask = np.full((height, width), 255, np.uint8)
    outlines = footprints(*actors)
    offset = actors.centres - view.position
    in_view = (offset @ view.global_from_sensor[:, 2] > -6) & (np.linalg.norm(offset[:, :2], axis=1) < _SHADOW_REACH)
    rows = []
    for index in np.nonzero(in_view)[0]:
        cast = -SUN[:2] / SUN[2] * min(actors.wlh[index, 2], _SHADOW_HEIGHT)
        outline = np.concatenate([outlines[index], outlines[index] + cast])
        hull = cv2.convexHull(outline.astype(np.float32))[:, 0]
        on_ground = np.column_stack([hull, np.zeros(len(hull))]) - view.position
        clipped = clip_near(on_ground @ view.global_from_sensor)
        if len(clipped) < 3:
            continue
        pixels = project(view, clipped)
        if pixels[:, 0].max() > 0 and pixels[:, 0].min() < width:
            cv2.fillConvexPoly(mask, to_fixed(pixels), 255 - _SHADOW_STRENGTH, cv2.LINE_AA, SUBPIXEL_BITS)
            rows += pixels[:, 1].tolist()
    if rows:
        top, bottom = np.clip([min(rows) - 1, max(rows) + 2], 0, height).astype(int)
        part = image[top:bottom]
        if len(part):
            cv2.multiply(part, cv2.merge([mask[top:bottom]] * 3), dst=part, scale=1 / 255.0)
