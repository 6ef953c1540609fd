"""Positions and motions of the objects of each class, for each layout."""

from dataclasses import dataclass
from math import pi


@dataclass(frozen=True)
class Zone:
    """A strip along the road with a kind of motion, from which an object's position, heading and speed are drawn.

    Attributes:
        weight: relative probability of this zone among the zones of its class.
        lateral: smallest and largest distance from the road's axis in metres.
        speed: smallest and largest speed along the heading in m/s.
        headings: possible headings in radians, relative to the direction of traffic on the object's side of the road.
        jitter: standard deviation of a random angle that is added to the heading, in radians.
        attribute: nuScenes attribute name, or '' for the classes that have none.
        sides: possible sides of the road: +1 is left of its axis, -1 is right of it.
        one_way: headings are relative to the ego's direction on both sides of the road.
    """

    weight: float
    lateral: tuple[float, float]
    speed: tuple[float, float]
    headings: tuple[float, ...]
    jitter: float
    attribute: str
    sides: tuple[int, ...] = (1, -1)
    one_way: bool = False


ALONG, EITHER, ACROSS = (0.0,), (0.0, pi), (pi / 2, -pi / 2)
ANY = (0.0, pi / 2, pi, -pi / 2)
"""Choices of headings in radians relative to the direction of traffic."""
_STILL = (0.0, 0.0)
"""Speed range of objects that do not move."""


def _square_vehicle(nearest: float, farthest: float) -> tuple[Zone, ...]:
    return (
        Zone(0.6, (nearest, farthest), _STILL, ALONG, 0.15, "vehicle.parked"),
        Zone(0.4, (nearest, farthest), (1.0, 4.0), ALONG, 0.05, "vehicle.moving"),
    )


_SQUARE_CYCLE = (
    Zone(0.4, (3.0, 14.0), _STILL, ALONG, 0.2, "cycle.without_rider"),
    Zone(0.6, (3.0, 18.0), (1.0, 4.0), ALONG, 0.05, "cycle.with_rider"),
)
SQUARE: dict[str, tuple[Zone, ...]] = {
    "car": _square_vehicle(3.5, 20.0),
    "truck": _square_vehicle(5.5, 24.0),
    "bus": _square_vehicle(9.0, 27.0),
    "trailer": _square_vehicle(9.0, 27.0),
    "construction_vehicle": _square_vehicle(6.0, 24.0)[:1],
    "pedestrian": (
        Zone(0.35, (2.6, 13.0), _STILL, ALONG, 0.4, "pedestrian.standing"),
        Zone(0.65, (2.6, 15.0), (0.8, 1.8), ALONG, 0.1, "pedestrian.moving"),
    ),
    "motorcycle": _SQUARE_CYCLE,
    "bicycle": _SQUARE_CYCLE,
    "traffic_cone": (Zone(1.0, (2.3, 11.0), _STILL, ALONG, 0.0, ""),),
    "barrier": (Zone(1.0, (3.0, 14.0), _STILL, (pi / 2,), 0.1, "", one_way=True),),
}

_LANE_EGO, _LANE_RIGHT, _LANE_LEFT = (0.0, 0.2), (3.4, 3.8), (3.4, 3.8)
"""Distances of lanes from the road's axis in metres: that of the ego, and those on its right and left."""


def _street_traffic(parked: float, speed: tuple[float, float], lateral: tuple[float, float]) -> tuple[Zone, ...]:
    moving = 0.85 * (1 - parked)
    return (
        Zone(parked, lateral, _STILL, ALONG, 0.02, "vehicle.parked"),
        Zone(0.25 * moving, _LANE_EGO, speed, ALONG, 0.01, "vehicle.moving", one_way=True),
        Zone(0.30 * moving, _LANE_RIGHT, speed, ALONG, 0.01, "vehicle.moving", sides=(-1,)),
        Zone(0.45 * moving, _LANE_LEFT, speed, ALONG, 0.01, "vehicle.moving", sides=(1,)),
        Zone(0.15 * (1 - parked), _LANE_RIGHT, _STILL, ALONG, 0.01, "vehicle.stopped"),
    )


_STREET_CYCLE = (
    Zone(0.55, (6.6, 9.6), _STILL, ACROSS, 0.3, "cycle.without_rider"),
    Zone(0.45, (5.1, 5.5), (2.5, 5.0), ALONG, 0.03, "cycle.with_rider"),
)
STREET: dict[str, tuple[Zone, ...]] = {
    "car": _street_traffic(0.6, (3.0, 10.0), (7.0, 7.4)),
    "truck": _street_traffic(0.6, (3.0, 9.0), (7.2, 7.6)),
    "bus": _street_traffic(0.5, (3.0, 8.0), (7.4, 7.8)),
    "trailer": _street_traffic(0.75, (3.0, 8.0), (7.4, 7.8)),
    "construction_vehicle": _street_traffic(0.85, (2.0, 5.0), (7.2, 7.8)),
    "pedestrian": (
        Zone(0.25, (9.3, 12.8), _STILL, ANY, 0.5, "pedestrian.standing"),
        Zone(0.68, (9.3, 12.8), (0.8, 1.7), EITHER, 0.1, "pedestrian.moving"),
        Zone(0.07, (4.0, 9.0), (0.9, 1.6), ACROSS, 0.1, "pedestrian.moving"),
    ),
    "motorcycle": _STREET_CYCLE,
    "bicycle": _STREET_CYCLE,
    "traffic_cone": (Zone(0.7, (5.7, 6.1), _STILL, ALONG, 0.0, ""), Zone(0.3, (8.9, 9.2), _STILL, ALONG, 0.0, "")),
    "barrier": (Zone(0.6, (5.9, 6.3), _STILL, ACROSS, 0.04, ""), Zone(0.4, (9.0, 9.3), _STILL, ACROSS, 0.04, "")),
}

ZONES = {"square": SQUARE, "street": STREET}
"""Zones of each class, by layout."""
ROW_SPACING = {"traffic_cone": 1.8, "barrier": 3.1}
"""Classes that form rows in the street layout, with the distance between neighbours in metres."""
EGO_WLH = (1.8, 4.1, 1.6)
"""Width, length and height of the ego in metres."""
EGO_CENTRE_AHEAD = 1.4
"""Distance from the ego's rear axle to its centre in metres."""
