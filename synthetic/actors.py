"""The objects of a scene: their class, size and motion, and their placement such that no two of them ever overlap."""

from dataclasses import dataclass

import numpy as np

from synthetic.boxes import footprints, outlines_overlap
from synthetic.classes import CLASSES
from synthetic.config import KEY_FRAME_INTERVAL, WorldConfig
from synthetic.road import EgoMotion, Road
from synthetic.solids import Solid, draw_colour, draw_rider_colour, make_solid
from synthetic.zones import EGO_CENTRE_AHEAD, EGO_WLH, ROW_SPACING, ZONES, Zone

_CLEARANCE = 0.5
"""Smallest distance between any two objects, in metres."""
_TRIES = 25
"""Number of positions tried for an object, or a row of objects, before it is left out."""


@dataclass(frozen=True)
class Actor:
    """One object of one scene.

    Attributes:
        class_name: detection class.
        wlh: width, length and height in metres.
        start: road coordinates s and d in metres at t = 0.
        speed: metres per second along its heading.
        heading: radians relative to the road; constant.
        attribute: nuScenes attribute name, or '' if the class has none.
        solid: its shape and colours.
    """

    class_name: str
    wlh: tuple[float, float, float]
    start: tuple[float, float]
    speed: float
    heading: float
    attribute: str
    solid: Solid

    def ground_pose(self, road: Road, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Global x and y (..., 2) in metres and yaw (...) in radians at times t (...) in seconds."""
        t = np.asarray(t, dtype=np.float64)
        s0, d0 = self.start
        stretch = 1 - road.curvature * d0  # on the inside of a bend, one metre corresponds to more than one metre of s
        s = s0 + self.speed * np.cos(self.heading) * t / stretch
        d = d0 + self.speed * np.sin(self.heading) * t
        return road.point(s, d), road.heading(s) + self.heading


def place_actors(config: WorldConfig, road: Road, ego: EgoMotion, rng: np.random.Generator) -> tuple[Actor, ...]:
    """Draw the objects of a scene: class by the layout's shares, position by its zones, such that no two overlap at any time."""
    times = np.arange(0, config.duration + 1e-9, KEY_FRAME_INTERVAL / 2)  # (T,): key frames, and half-way between them
    s = ego.travelled(times)
    ego_outline = footprints(road.point(s + EGO_CENTRE_AHEAD), road.heading(s), np.array(EGO_WLH) + 2 * _CLEARANCE)
    occupied = ego_outline[None]  # (N, T, 4, 2)
    actors: list[Actor] = []
    for class_name, row_length in _draw_classes(config, ego, rng):
        for _ in range(_TRIES):
            row = _draw_row(config, class_name, row_length, ego, rng)
            outlines = np.stack([footprints(*actor.ground_pose(road, times), np.array(actor.wlh) + _CLEARANCE) for actor in row])
            if not _overlap(occupied, outlines):
                occupied = np.concatenate([occupied, outlines])
                actors += row
                break
    return tuple(actors)


def _overlap(occupied: np.ndarray, outlines: np.ndarray) -> bool:
    """Return whether any of `outlines` (R, T, 4, 2) overlaps one of `occupied` (N, T, 4, 2) at any of T times."""
    centres = occupied.mean(-2)
    radii = np.linalg.norm(occupied - centres[..., None, :], axis=-1).max(-1)  # (N, T)
    for outline in outlines:
        centre = outline.mean(-2)
        radius = np.linalg.norm(outline - centre[:, None], axis=-1).max(-1)
        near = np.linalg.norm(centres - centre, axis=-1) < radii + radius  # (N, T)
        index, time = np.nonzero(near)
        if len(index) and outlines_overlap(occupied[index, time], outline[time]).any():
            return True
    return False


def _draw_classes(config: WorldConfig, ego: EgoMotion, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Class and number of objects of each row to place: long rows first, then large objects, as these are the hardest to fit."""
    road_length = float(ego.travelled(config.duration)) + 2 * config.reach
    total = max(len(CLASSES), round(config.object_density * road_length))
    longest = {name: 5 if config.layout == "street" and name in ROW_SPACING else 1 for name in CLASSES}
    drawn: list[tuple[str, int]] = []
    counts = _class_counts(config, total, rng)
    for name in sorted(CLASSES, key=lambda name: (-longest[name], -CLASSES[name].wlh[1])):
        count = counts[name]
        while count > 0:
            row_length = min(count, int(rng.integers(1, longest[name] + 1)))
            drawn.append((name, row_length))
            count -= row_length
    return drawn


def _class_counts(config: WorldConfig, total: int, rng: np.random.Generator) -> dict[str, int]:
    """Number of objects of each class: equal numbers in the square layout, by the classes' shares in the street layout."""
    if config.layout == "square":
        counts = np.full(len(CLASSES), total // len(CLASSES))
        counts[rng.permutation(len(CLASSES))[: total % len(CLASSES)]] += 1
    else:
        parts = [kind.share * kind.placed_per_share for kind in CLASSES.values()]
        counts = np.floor(total * np.array(parts) + rng.random(len(CLASSES))).astype(int)
    return dict(zip(CLASSES, counts.tolist(), strict=True))


def _draw_row(config: WorldConfig, class_name: str, row_length: int, ego: EgoMotion, rng: np.random.Generator) -> list[Actor]:
    zones = ZONES[config.layout][class_name]
    weights = np.array([zone.weight for zone in zones])
    zone = zones[rng.choice(len(zones), p=weights / weights.sum())]
    side = int(rng.choice(zone.sides))
    s, d, speed, heading = _draw_motion(config, zone, side, ego, rng)
    kind, spacing = CLASSES[class_name], ROW_SPACING.get(class_name, 0.0)
    row = []
    for place in range(row_length):
        wlh = tuple(np.maximum(0.7 * np.array(kind.wlh), rng.normal(kind.wlh, kind.spread)).round(3).tolist())
        colour = draw_colour(class_name, config.palette, rng)
        rider = draw_rider_colour(class_name, config.palette, rng) if zone.attribute == "cycle.with_rider" else None
        solid = make_solid(class_name, wlh, colour, rider)
        row.append(Actor(class_name, wlh, (s + spacing * place, d), speed, heading, zone.attribute, solid))
    return row


def _draw_motion(config: WorldConfig, zone: Zone, side: int, ego: EgoMotion, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Road coordinates s and d at t = 0, speed and heading, drawn such that the object is near the ego at some time of the scene."""
    meeting = rng.uniform(0, config.duration) if config.layout == "street" else config.duration / 2
    s = float(ego.travelled(meeting)) + rng.uniform(-config.reach, config.reach)
    d = side * rng.uniform(*zone.lateral)
    speed = float(rng.uniform(*zone.speed))
    oncoming = side > 0 and not zone.one_way
    heading = float(rng.choice(zone.headings)) + zone.jitter * float(rng.normal()) + (np.pi if oncoming else 0.0)
    return s - speed * np.cos(heading) * meeting, d - speed * np.sin(heading) * meeting, speed, heading
