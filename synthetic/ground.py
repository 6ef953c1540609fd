"""The ground of a scene: a texture in the global frame, drawn once per scene and warped into each image. Colours are blue, green, red."""

import cv2
import numpy as np

from qdbev.data.rig import View
from synthetic.street import Street

HAZE = np.array([222.0, 214.0, 205.0])
"""Colour that distant objects fade to."""
HAZE_PER_METRE = 0.004
"""Weight of the haze colour per metre of distance."""
_MIP_DISTANCES = (12.0, 25.0, 50.0, np.inf)
"""Distance in metres up to which each texture is used, fine to coarse, for texels of 0.12 m and images 1600 pixels wide."""
SUBPIXEL_BITS = 4
"""Fractional bits of OpenCV's fixed-point coordinates."""
GRASS, PAVING, ASPHALT, KERB = (78, 120, 98), (150, 154, 156), (88, 86, 84), (190, 190, 190)
LINE_WHITE, LINE_YELLOW = (226, 226, 226), (40, 190, 235)


class Ground:
    """The ground of a street: grass, pavement, road and lane markings, with noise as surface structure."""

    def __init__(self, street: Street, rng: np.random.Generator) -> None:
        texel, behind, margin = street.config.texel, street.config.reach + 40.0, 60.0
        s = np.arange(-behind, float(street.ego.travelled(street.config.duration)) + behind, 1.0)
        middle = street.road.point(s)
        low, high = middle.min(0) - margin, middle.max(0) + margin
        width, height = np.ceil((high - low) / texel).astype(int).tolist()
        texture = np.full((height, width, 3), GRASS, np.uint8)
        for left, right, colour in _BANDS[street.config.layout]:
            edge = np.concatenate([street.road.point(s, left), street.road.point(s, right)[::-1]])
            _fill(texture, (edge - low) / texel, colour)
        for start in np.arange(s[0], s[-1], 9.0):
            dash = street.road.point([start, start + 3, start + 3, start], [-1.7, -1.7, -1.88, -1.88])
            _fill(texture, (dash - low) / texel, LINE_WHITE)
        self._origin = low  # global x and y of the centre of texel (0, 0)
        self._texel = texel
        self._levels = [_add_noise(texture, rng)]  # each of half the resolution of the one before
        for _ in _MIP_DISTANCES[1:]:
            self._levels.append(cv2.resize(self._levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))

    def draw(self, image: np.ndarray, view: View) -> None:
        """Draw the ground, with haze, into the rows of `image` (H, W, 3) below the horizon, in place. The camera must be level."""
        height, width = image.shape[:2]
        focal, cy, eye = view.intrinsic[1, 1], view.intrinsic[1, 2], view.position[2]
        horizon = int(np.clip(np.ceil(cy), 0, height))
        cam_from_global = view.global_from_sensor.T
        cam_from_ground = np.column_stack([cam_from_global[:, :2], -cam_from_global @ view.position])
        img_from_ground = view.intrinsic @ cam_from_ground  # (3, 3), applied to (x, y, 1)
        bottom = height
        for level, (texture, distance) in enumerate(zip(self._levels, _MIP_DISTANCES, strict=True)):
            top = int(np.clip(cy + eye * focal / (distance * (self._texel / 0.12) * (focal / 1266.0)), horizon, bottom))
            if top < bottom:
                size = self._texel * 2**level
                corner = self._origin + (size - self._texel) / 2
                ground_from_texel = np.array([[size, 0, corner[0]], [0, size, corner[1]], [0, 0, 1.0]])
                rows_from_img = np.array([[1, 0, 0], [0, 1, -top], [0, 0, 1.0]])  # the rows from `top` on
                image[top:bottom] = cv2.warpPerspective(
                    texture,
                    rows_from_img @ img_from_ground @ ground_from_texel,
                    (width, bottom - top),
                    flags=cv2.INTER_LINEAR,
                    borderMode=cv2.BORDER_REPLICATE,
                )
            bottom = top
        _blend_haze(image[horizon:], eye * focal / (np.arange(horizon, height) + 1.0 - cy))


def _lines(offset: float, half_width: float, colour: tuple) -> tuple:
    """Strips of a line on both sides of the road, `offset` metres from its axis."""
    return tuple((side * offset + half_width, side * offset - half_width, colour) for side in (1, -1))


_BANDS = {
    "square": ((34.0, -34.0, PAVING), (5.4, -5.4, ASPHALT), *_lines(5.3, 0.09, LINE_WHITE), (1.9, 1.75, LINE_YELLOW)),
    "street": (
        (13.5, -13.5, PAVING),
        (8.8, -8.8, ASPHALT),
        *_lines(8.7, 0.12, KERB),
        *_lines(5.4, 0.08, LINE_WHITE),
        (1.88, 1.72, LINE_YELLOW),
    ),
}
"""Strips along the road of each layout: left and right edge in metres from the road's axis, and colour. Later strips cover earlier ones."""


def _fill(texture: np.ndarray, outline: np.ndarray, colour: tuple) -> None:
    """Fill a polygon (n, 2), given in texels, in place."""
    points = np.round(outline * 2**SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(texture, [points], colour, cv2.LINE_AA, SUBPIXEL_BITS)


def _add_noise(texture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The texture with fine and coarse noise, equal in the three channels."""
    height, width = texture.shape[:2]
    tile = rng.normal(0, 5, (256, 256)).astype(np.float32)
    fine = np.tile(tile, (height // 256 + 1, width // 256 + 1))[:height, :width]
    coarse = rng.normal(0, 8, (height // 16 + 2, width // 16 + 2)).astype(np.float32)
    noise = fine + cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.add(texture, cv2.merge([noise] * 3), dtype=cv2.CV_8U)


def _blend_haze(image: np.ndarray, distances: np.ndarray) -> None:
    """Blend haze into the rows of `image` (rows, W, 3), which show the ground at `distances` (rows,) in metres, in place."""
    alpha = np.minimum(0.9, HAZE_PER_METRE * np.maximum(distances, 0))[:, None]
    keep = np.broadcast_to(np.round(255 * (1 - alpha))[..., None], image.shape).astype(np.uint8)
    add = np.broadcast_to((alpha * HAZE)[:, None], image.shape).astype(np.uint8)
    cv2.multiply(image, keep, dst=image, scale=1 / 255.0)
    cv2.add(image, add, dst=image)
