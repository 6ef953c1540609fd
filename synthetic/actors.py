"""The objects of a street: who they are, how they move, and how they are placed without ever touching each other."""

from dataclasses import dataclass

import numpy as np

from synthetic.boxes import footprints, outlines_overlap
from synthetic.classes import CLASSES
from synthetic.config import KEY_FRAME_INTERVAL, WorldConfig
from synthetic.road import EgoMotion, Road
from synthetic.solids import Solid, draw_colour, draw_rider, make_solid
from synthetic.zones import EGO_CENTRE_AHEAD, EGO_WLH, ROW_SPACING, STREET_PLACED_PER_SHARE, ZONES, Zone

_CLEARANCE = 0.5  # metres kept between any two objects
_TRIES = 25  # places tried for one object before it is left out


@dataclass(frozen=True)
class Actor:
    """One object for one scene.

    Attributes:
        class_name: detection class.
        wlh: width, length, height.
        start: road coordinates s and d at t = 0.
        speed: m/s along its heading.
        heading: relative to the road; constant.
        attribute: nuScenes attribute name, or ''.
        solid: what it looks like.
    """

    class_name: str
    wlh: tuple[float, float, float]
    start: tuple[float, float]
    speed: float
    heading: float
    attribute: str
    solid: Solid

    def ground_pose(self, road: Road, t: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Global x and y (..., 2), and yaw (...), at times t (...)."""
        t = np.asarray(t, dtype=np.float64)
        s0, d0 = self.start
        stretch = 1 - road.curvature * d0  # a metre on the inside of a bend is more than a metre of s
        s = s0 + self.speed * np.cos(self.heading) * t / stretch
        d = d0 + self.speed * np.sin(self.heading) * t
        return road.point(s, d), road.heading(s) + self.heading


def place_actors(config: WorldConfig, road: Road, ego: EgoMotion, rng: np.random.Generator) -> tuple[Actor, ...]:
    """Fill the street: classes by the layout's shares, places by its zones, none overlapping at any time."""
    ground = _OccupiedGround(config, road, ego)
    actors: list[Actor] = []
    for class_name, row_length in _draw_classes(config, ego, rng):
        for _ in range(_TRIES):
            row = _draw_row(config, class_name, row_length, ego, rng)
            if ground.claim(row):
                actors += row
                break
    return tuple(actors)


class _OccupiedGround:
    """Ground outlines of everything placed so far, at all times that matter."""

    def __init__(self, config: WorldConfig, road: Road, ego: EgoMotion) -> None:
        self._road = road
        self._times = np.arange(0, config.duration + 1e-9, KEY_FRAME_INTERVAL / 2)  # (T,)
        s = ego.travelled(self._times)
        outline = footprints(road.point(s + EGO_CENTRE_AHEAD), road.heading(s), np.array(EGO_WLH) + 2 * _CLEARANCE)
        self._outlines = outline[None]  # (N, T, 4, 2)

    def claim(self, row: list[Actor]) -> bool:
        """Whether all of `row` fits; if so it is remembered."""
        outlines = np.stack([self._outline(actor) for actor in row])  # (R, T, 4, 2)
        centres = self._outlines.mean(-2)
        extents = np.linalg.norm(self._outlines - centres[..., None, :], axis=-1).max(-1)  # (N, T)
        for outline in outlines:
            middle = outline.mean(-2)
            reach = np.linalg.norm(outline - middle[:, None], axis=-1).max(-1)
            near = np.linalg.norm(centres - middle, axis=-1) < extents + reach  # (N, T)
            who, when = np.nonzero(near)
            if len(who) and outlines_overlap(self._outlines[who, when], outline[when]).any():
                return False
        self._outlines = np.concatenate([self._outlines, outlines])
        return True

    def _outline(self, actor: Actor) -> np.ndarray:
        centre, yaw = actor.ground_pose(self._road, self._times)
        return footprints(centre, yaw, np.array(actor.wlh) + _CLEARANCE)


def _draw_classes(config: WorldConfig, ego: EgoMotion, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Class and row length of everything to place: rows first, then big before small, as these are hardest to fit."""
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
    """How many objects of each class: equally many on a square, by their shares on a street."""
    if config.layout == "square":
        counts = np.full(len(CLASSES), total // len(CLASSES))
        counts[rng.permutation(len(CLASSES))[: total % len(CLASSES)]] += 1
    else:
        parts = [kind.share * STREET_PLACED_PER_SHARE.get(name, 1.0) for name, kind in CLASSES.items()]
        counts = np.floor(total * np.array(parts) + rng.random(len(CLASSES))).astype(int)
    return dict(zip(CLASSES, counts.tolist(), strict=True))


def _draw_row(config: WorldConfig, class_name: str, row_length: int, ego: EgoMotion, rng: np.random.Generator) -> list[Actor]:
    zones = ZONES[config.layout][class_name]
    weights = np.array([zone.weight for zone in zones])
    zone = zones[rng.choice(len(zones), p=weights / weights.sum())]
    side = int(rng.choice(zone.sides))
    s, d, speed, heading = _draw_motion(config, zone, side, ego, rng)
    spacing = ROW_SPACING.get(class_name, 0.0)
    return [_make_actor(config, class_name, zone, (s + spacing * place, d), speed, heading, rng) for place in range(row_length)]


def _draw_motion(config: WorldConfig, zone: Zone, side: int, ego: EgoMotion, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Road coordinates at t = 0, speed and heading, such that the object is near the ego at some time."""
    meeting = rng.uniform(0, config.duration) if config.layout == "street" else config.duration / 2
    s = float(ego.travelled(meeting)) + rng.uniform(-config.reach, config.reach)
    d = side * rng.uniform(*zone.lateral)
    speed = float(rng.uniform(*zone.speed))
    oncoming = side > 0 and not zone.one_way
    heading = float(rng.choice(zone.headings)) + zone.jitter * float(rng.normal()) + (np.pi if oncoming else 0.0)
    return s - speed * np.cos(heading) * meeting, d - speed * np.sin(heading) * meeting, speed, heading


def _make_actor(
    config: WorldConfig,
    class_name: str,
    zone: Zone,
    start: tuple[float, float],
    speed: float,
    heading: float,
    rng: np.random.Generator,
) -> Actor:
    kind = CLASSES[class_name]
    mean = np.array(kind.wlh)
    width, length, height = np.maximum(0.7 * mean, rng.normal(mean, kind.spread)).round(3).tolist()
    colour = draw_colour(class_name, config.palette, rng)
    rider = draw_rider(class_name, config.palette, rng) if zone.attribute == "cycle.with_rider" else None
    wlh = (width, length, height)
    solid = make_solid(class_name, wlh, colour, rider)
    return Actor(class_name, wlh, start, speed, heading, zone.attribute, solid)
