"""One scene: a road, the ego that drives on it, the objects around it and the houses beside it, with their poses at any time."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qdbev.data.rig import CHANNELS, LIDAR, Sensor, View, make_sensor, view_from
from synthetic.actors import Actor, place_actors
from synthetic.boxes import Boxes
from synthetic.classes import CLASSES
from synthetic.config import KEY_FRAME_INTERVAL, WorldConfig
from synthetic.lidar import sweep
from synthetic.road import EgoMotion, Road
from synthetic.solids import Solid, make_house

_ATTEMPTS = 200
"""Number of random streets tried for a scene."""
_HOUSE_DEPTH, _HOUSE_FRONT = 12.0, 14.5
"""Depth of a house, away from the road, and distance of the house fronts from the road's axis, in metres."""


@dataclass(frozen=True)
class Street:
    """A scene, with the poses of everything in it at any time. N is the number of actors, F that of key frames.

    Attributes:
        config: settings of the world it belongs to.
        scene_name: name of the scene.
        road: the road.
        ego: motion of the ego along the road.
        actors: the objects; other arrays refer to them by index.
        houses: boxes of the houses in the global frame; none in worlds without houses.
        house_solids: shapes of the houses.
    """

    config: WorldConfig
    scene_name: str
    road: Road
    ego: EgoMotion
    actors: tuple[Actor, ...]
    houses: Boxes
    house_solids: tuple[Solid, ...]

    @cached_property
    def sensors(self) -> dict[str, Sensor]:
        """The ego's sensors by channel."""
        return {channel: make_sensor(channel, self.config.image_hw[1]) for channel in CHANNELS}

    @property
    def key_times(self) -> np.ndarray:
        """(F,) times of the key frames, in seconds."""
        return np.arange(self.config.num_samples) * KEY_FRAME_INTERVAL

    def rng(self, *purpose: int) -> np.random.Generator:
        """A random generator that depends on the world's seed, the scene and the numbers in `purpose` only."""
        return np.random.default_rng((self.config.seed, _number(self.scene_name), 1_000_000, *purpose))

    def ego_pose(self, t: float) -> tuple[np.ndarray, float]:
        """Position (3,) in metres, with z = 0, and heading in radians of the ego at time t, global frame."""
        s = self.ego.travelled(t)
        return np.append(self.road.point(s), 0.0), float(self.road.heading(s))

    def view(self, channel: str, frame: int) -> tuple[View, float]:
        """Pose of a sensor at a key frame, and the time of its measurement in seconds."""
        sensor = self.sensors[channel]
        t = float(self.key_times[frame]) + sensor.delay_us / 1e6
        return view_from(sensor, *self.ego_pose(t)), t

    def actor_boxes(self, t: float) -> Boxes:
        """Boxes of the N actors at time t, global frame."""
        wlh = np.array([actor.wlh for actor in self.actors])
        points, yaws = zip(*(actor.ground_pose(self.road, t) for actor in self.actors), strict=True)
        return Boxes(np.column_stack([points, wlh[:, 2] / 2]), np.array(yaws), wlh)

    def in_range(self) -> np.ndarray:
        """(F, N) bool, true where an actor's centre is within the annotation radius of the ego at a key frame."""
        offsets = np.array([self.actor_boxes(t).centres - self.ego_pose(t)[0] for t in self.key_times])  # (F, N, 3)
        return np.linalg.norm(offsets[..., :2], axis=-1) < self.config.annotation_radius


def build_street(config: WorldConfig, scene_name: str) -> Street:
    """Draw the street of a scene. It depends on `config` and the number in the scene's name only.

    Raises:
        ValueError: No street has a number of objects in range that `config.mean_annotated` allows.
    """
    for attempt in range(_ATTEMPTS):
        street = _draw_street(config, scene_name, np.random.default_rng((config.seed, _number(scene_name), attempt)))
        if _is_acceptable(street):
            return street
    raise ValueError(
        f"world {config.name!r}: none of {_ATTEMPTS} streets for {scene_name} has a number of objects in range within mean_annotated = "
        f"{config.mean_annotated}; change object_density = {config.object_density} or widen mean_annotated"
    )


def _number(scene_name: str) -> int:
    return int(scene_name[-4:])


def _draw_street(config: WorldConfig, scene_name: str, rng: np.random.Generator) -> Street:
    x, y = rng.uniform(300, 1200, 2).tolist()
    road = Road((x, y), rng.uniform(-np.pi, np.pi), rng.uniform(-config.max_curvature, config.max_curvature))
    speed = rng.uniform(*config.ego_speed)
    speed_at_end = float(np.clip(speed + rng.uniform(-1.5, 1.5), *config.ego_speed))
    ego = EgoMotion(speed, (speed_at_end - speed) / max(config.duration, KEY_FRAME_INTERVAL))
    actors = place_actors(config, road, ego, rng)
    return Street(config, scene_name, road, ego, actors, *_draw_houses(config, road, ego, rng))


def _draw_houses(config: WorldConfig, road: Road, ego: EgoMotion, rng: np.random.Generator) -> tuple[Boxes, tuple[Solid, ...]]:
    length = float(ego.travelled(config.duration))
    centres, yaws, sizes, solids = [], [], [], []
    for side in (1, -1) if config.buildings else ():
        s = -110.0
        while s < length + 120:
            front, height, grey = rng.uniform(10, 26), rng.uniform(5, 16), rng.uniform(110, 190)
            colour = (int(grey), int(grey * rng.uniform(0.85, 1.05)), int(grey * rng.uniform(0.9, 1.2)))
            middle, wlh = s + front / 2, (_HOUSE_DEPTH, front, height)
            centres.append([*road.point(middle, side * (_HOUSE_FRONT + _HOUSE_DEPTH / 2)), height / 2])
            yaws.append(road.heading(middle))
            sizes.append(wlh)
            solids.append(make_house(wlh, side, colour))
            s += front + float(rng.choice([1.0, 1.0, 7.0]))
    return Boxes(np.reshape(centres, (-1, 3)), np.array(yaws), np.reshape(sizes, (-1, 3))), tuple(solids)


def _is_acceptable(street: Street) -> bool:
    """Return whether the number of objects in range is allowed and, in the square layout, whether every class can be evaluated.

    A class can be evaluated if it is in range in half of the key frames or more, and has lidar points in one of about three of them.
    """
    in_range = street.in_range()
    fewest, most = street.config.mean_annotated
    if not fewest <= in_range.sum(1).mean() <= most:
        return False
    if street.config.layout == "street":
        return True
    names = np.array([actor.class_name for actor in street.actors])
    if any(in_range[:, names == name].any(1).mean() < 0.5 for name in CLASSES):
        return False
    frames = range(0, len(in_range), max(1, len(in_range) // 3))
    valid = np.any([in_range[frame] & (_lidar_points(street, frame) > 0) for frame in frames], axis=0)  # (N,)
    return set(names[valid]) == set(CLASSES)


def _lidar_points(street: Street, frame: int) -> np.ndarray:
    """Number of lidar points (N,) on each actor at a key frame."""
    view, t = street.view(LIDAR, frame)
    return sweep(view, street.actor_boxes(t), street.config.lidar_columns, np.random.default_rng(0))[1]
