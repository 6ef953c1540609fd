"""One scene: a road, the ego that drives on it, the objects around, and the houses beside. Answers where all is at time t."""

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
_BUILDING_DEPTH = 12.0
_BUILDING_FRONT = 14.5  # metres from the road's axis


@dataclass(frozen=True)
class Building:
    """A house: global centre (3,), yaw, width/length/height and looks."""

    centre: np.ndarray
    yaw: float
    wlh: tuple[float, float, float]
    solid: Solid


class Street:
    """A scene at any time. N is the number of actors.

    Attributes:
        config: the world it belongs to.
        road: where the road lies.
        ego: how the ego drives.
        actors: the objects; their index is their identity.
        buildings: houses; none where the world has none.
        wlh: (N, 3) sizes of the actors.
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
        """Global position (3,), z = 0, and yaw of the ego."""
        s = self.ego.travelled(t)
        return np.append(self.road.point(s), 0.0), float(self.road.heading(s))

    def actor_poses(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Global box centres (N, 3) and yaws (N,) of the actors."""
        ground = [actor.ground_pose(self.road, t) for actor in self.actors]
        centres = np.array([[*point, height / 2] for (point, _), height in zip(ground, self.wlh[:, 2], strict=True)])
        return centres, np.array([yaw for _, yaw in ground])

    def in_range(self, t: float) -> np.ndarray:
        """(N,) whether an actor's centre is within the annotation radius of the ego."""
        position, _ = self.ego_pose(t)
        centres, _ = self.actor_poses(t)
        return np.linalg.norm((centres - position)[:, :2], axis=1) < self.config.annotation_radius


def build_street(config: WorldConfig, scene_name: str) -> Street:
    """The street of a scene; the same for the same config and name.

    Raises:
        ValueError: no street with the wanted number of objects in range was found.
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
        f"world {config.name!r}: no street for {scene_name} in {_ATTEMPTS} attempts with mean_annotated = "
        f"{config.mean_annotated}; change object_density = {config.object_density} or widen mean_annotated"
    )


def _draw_ego(config: WorldConfig, rng: np.random.Generator) -> EgoMotion:
    slowest, fastest = config.ego_speed
    speed = float(rng.uniform(slowest, fastest))
    at_end = float(np.clip(speed + rng.uniform(-1.5, 1.5), slowest, fastest))
    return EgoMotion(speed, (at_end - speed) / max(config.duration, KEY_FRAME_INTERVAL))


def _is_acceptable(street: Street) -> bool:
    """Whether enough and not too many objects are in range; on a square, also whether each class can be evaluated."""
    in_range = np.array([street.in_range(t) for t in street.key_times])  # (F, N)
    fewest, most = street.config.mean_annotated
    if not fewest <= in_range.sum(1).mean() <= most:
        return False
    return street.config.layout == "street" or _has_valid_truth(street, in_range)


def _has_valid_truth(street: Street, in_range: np.ndarray) -> bool:
    """Whether each class is in range half the time, and met by the lidar in one of a few key frames."""
    names = np.array([actor.class_name for actor in street.actors])
    if any(in_range[:, names == name].any(1).mean() < 0.5 for name in CLASSES):
        return False
    frames = range(0, len(in_range), max(1, len(in_range) // 3))
    valid = np.any([in_range[frame] & (_lidar_points(street, frame) > 0) for frame in frames], axis=0)  # (N,)
    return set(names[valid]) == set(CLASSES)


def _lidar_points(street: Street, frame: int) -> np.ndarray:
    """(N,) lidar points on each actor at a key frame."""
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
