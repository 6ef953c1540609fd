"""Shapes and colours of the objects: tapered blocks, with decals that make front and back look different.

Local frame: x along the heading (length), y to the left (width), z up, origin at the centre of the annotated box. All blocks are inside
the box. Colours are blue, green, red. Lengths are in metres.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from synthetic.boxes import CUBE, CUBE_FACES
from synthetic.classes import CLASSES, Colour

DARK, GLASS, WHITE, SKIN = (38, 36, 36), (112, 88, 66), (242, 242, 242), (140, 175, 225)
HEADLIGHT, TAILLIGHT, TROUSERS = (225, 255, 255), (25, 25, 240), (95, 60, 45)
CAR_PAINTS = ((200, 200, 205), (60, 60, 65), (150, 60, 35), (40, 40, 190), (235, 235, 235), (110, 120, 110), (90, 140, 60))
CLOTHES = ((160, 60, 60), (60, 60, 170), (70, 140, 70), (45, 45, 45), (180, 170, 60), (170, 60, 160))
DECAL_OFFSET = 0.01
"""Distance in metres of a decal from the surface it is painted on."""
DECAL_PX_PER_M = 5.0
"""Decals are left out where a metre has fewer pixels than this in the image."""


class Quad(NamedTuple):
    """A quadrilateral: a face of a block, or a decal.

    Attributes:
        corners: (4, 3), counter-clockwise seen from outside.
        colour: its colour before shading.
        block_centre: (3,) centre of the block that it belongs to; far blocks are drawn first.
        is_decal: whether it is painted onto a block, and so drawn after the blocks.
    """

    corners: np.ndarray
    colour: Colour
    block_centre: np.ndarray
    is_decal: bool


class Solid:
    """The quads of one object, in drawing order within a block."""

    def __init__(self) -> None:
        self.quads: list[Quad] = []

    def block(self, centre: tuple, lwh: tuple, colour: Colour, taper: float | tuple[float, float] = 1.0) -> None:
        """Add a block of length, width and height `lwh`. Its top face is `taper` times as large as its bottom face in x and y."""
        unit = CUBE.copy()
        unit[unit[:, 2] > 0, :2] *= taper
        points = unit * lwh + centre  # (8, 3)
        self.quads += [Quad(points[face], colour, np.array(centre, dtype=float), False) for face in CUBE_FACES]

    def side_decal(self, x: float, y: float, z: float, half_xz: tuple[float, float], colour: Colour) -> None:
        """Add the same rectangle to the left side at y and to the right side at -y."""
        half_x, half_z = half_xz
        for side in (1, -1):
            self.decal((x, side * (y + DECAL_OFFSET), z), (-half_x * side, 0, 0), (0, 0, half_z), colour)

    def end_decal(self, x: float, y: float, z: float, half_yz: tuple[float, float], colour: Colour, lean: float = 0.0) -> None:
        """Add a rectangle that faces forward (x > 0) or backward (x < 0). Its upper edge is `lean` metres ahead of its centre."""
        half_y, half_z = half_yz
        sign = 1 if x > 0 else -1
        self.decal((x + sign * DECAL_OFFSET, y, z), (0, sign * half_y, 0), (lean, 0, half_z), colour)

    def decal(self, centre: tuple, across: tuple, up: tuple, colour: Colour) -> None:
        """Add a rectangle, from its centre and the vectors to the middle of its right and of its upper edge, seen from outside."""
        middle, across, up = np.array(centre, dtype=float), np.array(across), np.array(up)
        points = np.array([middle - across - up, middle + across - up, middle + across + up, middle - across + up])
        self.quads.append(Quad(points, colour, middle, True))


def make_solid(class_name: str, wlh: tuple[float, float, float], colour: Colour, rider: Colour | None = None) -> Solid:
    """The shape of one object. `rider` is the colour of the rider's clothes on a motorcycle or bicycle, or None if there is no rider."""
    solid = Solid()
    if class_name in ("motorcycle", "bicycle"):
        _two_wheeler(solid, *wlh, colour, 0.42 if class_name == "motorcycle" else 0.2, rider)
    else:
        _BUILDERS[class_name](solid, *wlh, colour)
    return solid


def draw_colour(class_name: str, palette: str, rng: np.random.Generator) -> Colour:
    """Colour of one object: the class's own colour at a random brightness, or a common colour of such objects in the natural palette."""
    paints = {"car": CAR_PAINTS, "pedestrian": CLOTHES}.get(class_name)
    if palette == "natural" and paints is not None:
        return paints[rng.integers(len(paints))]
    return _shade(CLASSES[class_name].hue, rng.uniform(0.88, 1.06))


def draw_rider_colour(class_name: str, palette: str, rng: np.random.Generator) -> Colour:
    """Colour of a rider's clothes: a dark shade of the class's own colour, or a common colour of clothes in the natural palette."""
    return CLOTHES[rng.integers(len(CLOTHES))] if palette == "natural" else _shade(CLASSES[class_name].hue, 0.65)


def make_house(wlh: tuple[float, float, float], side: int, colour: Colour) -> Solid:
    """A house with windows towards the road. `side` is +1 for a house on the left of the road, -1 for one on the right."""
    width, length, height = wlh
    solid = Solid()
    solid.block((0, 0, 0), (length, width, height), colour)
    for z in np.arange(1.5, height - 1.5, 3.2):
        for x in np.arange(-length / 2 + 1.5, length / 2 - 1, 3.0):
            centre = (x, -side * (width / 2 + DECAL_OFFSET), z - height / 2)
            solid.decal(centre, (0.8 * side, 0, 0), (0, 0, 0.8), (110, 90, 75))
    return solid


def _shade(colour: Colour, factor: float) -> Colour:
    blue, green, red = (int(min(255, channel * factor)) for channel in colour)
    return blue, green, red


def _lights(solid: Solid, length: float, y: float, z: float, half_yz: tuple[float, float]) -> None:
    for side in (1, -1):
        solid.end_decal(length / 2, side * y, z, half_yz, HEADLIGHT)
        solid.end_decal(-length / 2, side * y, z, half_yz, TAILLIGHT)


def _wheels(solid: Solid, positions: tuple[float, ...], width: float, height: float, radius: float) -> None:
    for x in positions:
        solid.side_decal(x, width / 2, -height / 2 + radius, (radius, radius), DARK)


def _car(solid: Solid, width: float, length: float, height: float, colour: Colour) -> None:
    body = 0.55 * height
    cabin, deck = height - body, -height / 2 + body
    solid.block((0, 0, -height / 2 + body / 2 + 0.06), (length, width, body - 0.12), colour)
    solid.block((-0.08 * length, 0, deck + cabin / 2), (0.6 * length, 0.9 * width, cabin), _shade(colour, 0.85), (0.72, 0.86))
    middle = deck + 0.45 * cabin
    solid.side_decal(-0.08 * length, 0.425 * width, middle, (0.22 * length, 0.3 * cabin), GLASS)
    solid.end_decal(0.183 * length, 0, middle, (0.38 * width, 0.36 * cabin), GLASS, lean=-0.03 * length)
    solid.end_decal(-0.343 * length, 0, middle, (0.34 * width, 0.3 * cabin), _shade(GLASS, 0.7), lean=0.025 * length)
    _lights(solid, length, 0.36 * width, -height / 2 + 0.62 * body, (0.12 * width, 0.16 * body))
    _wheels(solid, (0.32 * length, -0.32 * length), width, height, 0.19 * height)


def _truck(solid: Solid, width: float, length: float, height: float, colour: Colour) -> None:
    cab = 0.3 * length
    solid.block((length / 2 - cab / 2, 0, -0.08 * height), (cab, width, 0.84 * height), colour)
    solid.block((-cab / 2 - 0.07, 0, 0.06 * height), (length - cab - 0.15, width, 0.88 * height), _shade(colour, 0.75))
    solid.end_decal(length / 2, 0, 0.12 * height, (0.42 * width, 0.14 * height), GLASS)
    solid.side_decal(length / 2 - 0.4 * cab, width / 2, 0.12 * height, (0.3 * cab, 0.12 * height), GLASS)
    _lights(solid, length, 0.36 * width, -0.32 * height, (0.12 * width, 0.06 * height))
    _wheels(solid, (0.36 * length, -0.2 * length, -0.36 * length), width, height, 0.16 * height)


def _bus(solid: Solid, width: float, length: float, height: float, colour: Colour) -> None:
    solid.block((0, 0, 0.04 * height), (length, width, 0.92 * height), colour)
    for window in range(6):
        solid.side_decal(length * (-0.42 + 0.15 * window), width / 2, 0.18 * height, (0.06 * length, 0.15 * height), GLASS)
    solid.end_decal(length / 2, 0, 0.15 * height, (0.44 * width, 0.22 * height), GLASS)
    solid.side_decal(0.44 * length, width / 2, -0.02 * height, (0.035 * length, 0.35 * height), DARK)  # door
    _lights(solid, length, 0.36 * width, -0.33 * height, (0.12 * width, 0.06 * height))
    _wheels(solid, (0.34 * length, -0.3 * length), width, height, 0.14 * height)


def _trailer(solid: Solid, width: float, length: float, height: float, colour: Colour) -> None:
    solid.block((-0.1 * length, 0, -0.34 * height), (0.8 * length, 0.5 * width, 0.16 * height), DARK)
    solid.block((0.46 * length, 0, -0.34 * height), (0.08 * length, 0.15 * width, 0.1 * height), DARK)
    solid.block((0, 0, 0.12 * height), (length, width, 0.76 * height), colour)
    solid.side_decal(0, width / 2, 0.12 * height, (0.46 * length, 0.07 * height), (165, 80, 40))
    solid.end_decal(-length / 2, 0, 0.12 * height, (0.03 * width, 0.36 * height), DARK)
    for side in (1, -1):
        solid.end_decal(-length / 2, side * 0.38 * width, -0.18 * height, (0.1 * width, 0.05 * height), TAILLIGHT)
    _wheels(solid, (-0.24 * length, -0.34 * length, -0.44 * length), width, height, 0.13 * height)


def _construction_vehicle(solid: Solid, width: float, length: float, height: float, colour: Colour) -> None:
    solid.block((-0.08 * length, 0, -0.36 * height), (0.84 * length, width, 0.28 * height), DARK)
    solid.block((-0.2 * length, 0, 0.0), (0.6 * length, 0.86 * width, 0.44 * height), colour)
    solid.block((-0.02 * length, 0.1 * width, 0.36 * height), (0.28 * length, 0.56 * width, 0.28 * height), _shade(GLASS, 1.2), 0.85)
    solid.block((0.3 * length, -0.12 * width, 0.12 * height), (0.4 * length, 0.2 * width, 0.14 * height), _shade(colour, 0.9))
    solid.block((0.45 * length, 0, -0.26 * height), (0.1 * length, 0.9 * width, 0.36 * height), _shade(colour, 0.6))
    for side in (1, -1):
        solid.end_decal(-0.5 * length, side * 0.32 * width, 0.0, (0.1 * width, 0.06 * height), TAILLIGHT)


def _pedestrian(solid: Solid, width: float, length: float, height: float, colour: Colour) -> None:
    for side in (1, -1):
        solid.block((side * 0.2 * length, side * 0.2 * width, -0.27 * height), (0.44 * length, 0.24 * width, 0.46 * height), TROUSERS)
    solid.block((0, 0, 0.135 * height), (0.56 * length, 0.9 * width, 0.35 * height), colour, 0.85)
    solid.block((0.02 * length, 0, 0.41 * height), (0.32 * length, 0.34 * width, 0.18 * height), SKIN)
    solid.end_decal(-0.14 * length, 0, 0.42 * height, (0.17 * width, 0.07 * height), DARK)  # hair
    solid.end_decal(-0.27 * length, 0, 0.14 * height, (0.26 * width, 0.11 * height), DARK)  # bag


def _two_wheeler(solid: Solid, width: float, length: float, height: float, colour: Colour, thickness: float, rider: Colour | None) -> None:
    machine = 0.72 * height if rider else height
    radius, floor = 0.3 * machine, -height / 2
    for x in (0.5 * length - radius, radius - 0.5 * length):
        solid.block((x, 0, floor + radius), (2 * radius, 0.5 * thickness * width, 2 * radius), DARK)
    solid.block((-0.03 * length, 0, floor + 0.55 * machine), (0.55 * length, thickness * width, 0.45 * machine), colour)
    solid.block((0.27 * length, 0, floor + 0.9 * machine), (0.06 * length, width, 0.12 * machine), DARK)
    solid.end_decal(0.3 * length, 0, floor + 0.78 * machine, (0.2 * width, 0.07 * machine), HEADLIGHT)
    solid.end_decal(-0.31 * length, 0, floor + 0.65 * machine, (0.16 * width, 0.07 * machine), TAILLIGHT)
    if rider:
        solid.block((-0.08 * length, 0, 0.15 * height), (0.26 * length, 0.8 * width, 0.44 * height), rider, 0.8)
        solid.block((-0.04 * length, 0, 0.435 * height), (0.15 * length, 0.36 * width, 0.13 * height), SKIN)


def _traffic_cone(solid: Solid, width: float, length: float, height: float, colour: Colour) -> None:
    solid.block((0, 0, -0.47 * height), (length, width, 0.06 * height), DARK)
    solid.block((0, 0, -0.29 * height), (0.8 * length, 0.8 * width, 0.3 * height), colour, 0.75)
    solid.block((0, 0, -0.02 * height), (0.6 * length, 0.6 * width, 0.24 * height), WHITE, 0.75)
    solid.block((0, 0, 0.3 * height), (0.45 * length, 0.45 * width, 0.4 * height), colour, 0.4)


def _barrier(solid: Solid, width: float, length: float, height: float, colour: Colour) -> None:
    for side in (1, -1):
        solid.block((0, side * 0.36 * width, -0.36 * height), (length, 0.08 * width, 0.28 * height), DARK)
    solid.block((0, 0, 0.14 * height), (0.7 * length, width, 0.72 * height), colour)
    for stripe in (-0.32, 0.0, 0.32):
        for sign in (1, -1):
            solid.end_decal(sign * 0.35 * length, stripe * width, 0.14 * height, (0.07 * width, 0.34 * height), WHITE)


_BUILDERS: dict[str, Callable[[Solid, float, float, float, Colour], None]] = {
    "car": _car,
    "truck": _truck,
    "bus": _bus,
    "trailer": _trailer,
    "construction_vehicle": _construction_vehicle,
    "pedestrian": _pedestrian,
    "traffic_cone": _traffic_cone,
    "barrier": _barrier,
}
