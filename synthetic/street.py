"""One scene: a road, the ego that drives on it, the objects around it and the houses beside it, with their poses at any time."""

from dataclasses import dataclass

import numpy as np

from qdbev.data.rig import LIDAR, make_sensor, view_from
from synthetic.actors import Actor, place_actors
from synthetic.classes import CLASSES
from synthetic.config import KEY_FRAME_INTERVAL, WorldConfig
from synthetic.lidar import sweep
from synthetic.road import EgoMotion, Road
from synthetic.solids import Solid, make_building

_ATTEMPTS = 200
"""Number of random streets tried for a scene."""
_BUILDING_DEPTH = 12.0
"""Depth of a house in metres, away from the road."""
_BUILDING_FRONT = 14.5
"""Distance of the house fronts from the road's axis in metres."""


@dataclass(frozen=True)
class Building:
    """A house: centre (3,) and heading in the global frame, width, length and height, and its shape."""

    centre: np.ndarray
    yaw: float
    wlh: tuple[float, float, float]
    solid: Solid


class Street:
    """A scene, with the poses of everything in it at any time. N is the number of actors.

    Attributes:
        config: settings of the world it belongs to.
        road: the road.
        ego: motion of the ego along the road.
        actors: the objects; other arrays refer to them by index.
        buildings: the houses; empty in worlds without houses.
        wlh: (N, 3) width, length and height of the actors in metres.
    """

    def __init__(self, config: WorldConfig, road: Road, ego: EgoMotion, actors: tuple[Actor, ...]) -> None:
        self.config = config
        self.road = road
        self.ego = ego
        self.actors = actors
        self.buildings: tuple[Building, ...] = ()
        self.wlh = np.array([actor.wlh for actor in actors])

    @property
    def key_times(self) -> np.ndarray:
        """(F,) times of the key frames, in seconds."""
        return np.arange(self.config.num_samples) * KEY_FRAME_INTERVAL

    def ego_pose(self, t: float) -> tuple[np.ndarray, float]:
        """Position (3,) in metres, with z = 0, and heading in radians of the ego at time t, global frame."""
        s = self.ego.travelled(t)
        return np.append(self.road.point(s), 0.0), float(self.road.heading(s))

    def actor_poses(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Box centres (N, 3) in metres and headings (N,) in radians of the actors at time t, global frame."""
        ground = [actor.ground_pose(self.road, t) for actor in self.actors]
        centres = np.array([[*point, height / 2] for (point, _), height in zip(ground, self.wlh[:, 2], strict=True)])
        return centres, np.array([yaw for _, yaw in ground])

    def in_range(self, t: float) -> np.ndarray:
        """(N,) bool, true for actors whose centre is within the annotation radius of the ego at time t."""
        position, _ = self.ego_pose(t)
        centres, _ = self.actor_poses(t)
        return np.linalg.norm((centres - position)[:, :2], axis=1) < self.config.annotation_radius


def build_street(config: WorldConfig, scene_name: str) -> Street:
    """Draw the street of a scene. It depends on `config` and the number in the scene's name only.

    Raises:
        ValueError: No street has a number of objects in range that `config.mean_annotated` allows.
    """
    number = int(scene_name[-4:])
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng((config.seed, number, attempt))
        origin = rng.uniform(300, 1200, 2)
        road = Road(
            (float(origin[0]), float(origin[1])),
            float(rng.uniform(-np.pi, np.pi)),
            float(rng.uniform(-config.max_curvature, config.max_curvature)),
        )
        ego = _draw_ego(config, rng)
        street = Street(config, road, ego, place_actors(config, road, ego, rng))
        if _is_acceptable(street):
            if config.buildings:
                street.buildings = _place_buildings(street, rng)
            return street
    raise ValueError(
        f"world {config.name!r}: none of {_ATTEMPTS} streets for {scene_name} has a number of objects in range within mean_annotated = "
        f"{config.mean_annotated}; change object_density = {config.object_density} or widen mean_annotated"
    )


def _draw_ego(config: WorldConfig, rng: np.random.Generator) -> EgoMotion:
    slowest, fastest = config.ego_speed
    speed = float(rng.uniform(slowest, fastest))
    at_end = float(np.clip(speed + rng.uniform(-1.5, 1.5), slowest, fastest))
    return EgoMotion(speed, (at_end - speed) / max(config.duration, KEY_FRAME_INTERVAL))


def _is_acceptable(street: Street) -> bool:
    """Return whether the number of objects in range is allowed and, in the square layout, whether every class can be evaluated."""
    in_range = np.array([street.in_range(t) for t in street.key_times])  # (F, N)
    fewest, most = street.config.mean_annotated
    if not fewest <= in_range.sum(1).mean() <= most:
        return False
    return street.config.layout == "street" or _every_class_can_be_evaluated(street, in_range)


def _every_class_can_be_evaluated(street: Street, in_range: np.ndarray) -> bool:
    """Return whether each class is in range in half of the key frames or more, and has lidar points in one of about three of them."""
    names = np.array([actor.class_name for actor in street.actors])
    if any(in_range[:, names == name].any(1).mean() < 0.5 for name in CLASSES):
        return False
    frames = range(0, len(in_range), max(1, len(in_range) // 3))
    valid = np.any([in_range[frame] & (_lidar_points(street, frame) > 0) for frame in frames], axis=0)  # (N,)
    return set(names[valid]) == set(CLASSES)


def _lidar_points(street: Street, frame: int) -> np.ndarray:
    """Number of lidar points (N,) on each actor at a key frame."""
    t = float(street.key_times[frame])
    view = view_from(make_sensor(LIDAR, street.config.image_hw[1]), *street.ego_pose(t))
    boxes = (*street.actor_poses(t), street.wlh)
    return sweep(view, boxes, street.config.lidar_columns, np.random.default_rng(0))[1]


def _place_buildings(street: Street, rng: np.random.Generator) -> tuple[Building, ...]:
    length = float(street.ego.travelled(street.config.duration))
    buildings = []
    for side in (1, -1):
        s = -110.0
        while s < length + 120:
            front, height, grey = rng.uniform(10, 26), rng.uniform(5, 16), rng.uniform(110, 190)
            colour = (int(grey), int(grey * rng.uniform(0.85, 1.05)), int(grey * rng.uniform(0.9, 1.2)))
            middle = s + front / 2
            point = street.road.point(middle, side * (_BUILDING_FRONT + _BUILDING_DEPTH / 2))
            wlh = (_BUILDING_DEPTH, float(front), float(height))
            buildings.append(
                Building(
                    np.append(point, height / 2),
                    float(street.road.heading(middle)),
                    wlh,
                    make_building(wlh, side, colour),
                )
            )
            s += front + float(rng.choice([1.0, 1.0, 7.0]))
    return tuple(buildings)
