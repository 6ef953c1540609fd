"""The ten detection classes with their nuScenes category, size, colour and frequency, and the names in the tables.

Sizes and shares are rounded from the statistics that the nuScenes devkit prints for v1.0-trainval (`list_categories`).
"""

from dataclasses import dataclass

Colour = tuple[int, int, int]
"""Blue, green, red, 0 to 255."""


@dataclass(frozen=True)
class ObjectClass:
    """One detection class.

    Attributes:
        category: nuScenes category name.
        wlh: mean width, length and height in metres. A barrier is wider than it is long: its heading is perpendicular to its face.
        spread: standard deviations of width, length and height in metres.
        hue: colour of the class in worlds where each class has one colour.
        share: fraction of all annotations of nuScenes v1.0-trainval that are of this class.
        placed_per_share: objects placed in the street layout, divided by `share`: small objects are often hidden and then not
            annotated, large ones seldom.
    """

    category: str
    wlh: tuple[float, float, float]
    spread: tuple[float, float, float]
    hue: Colour
    share: float
    placed_per_share: float


CLASSES = {
    "car": ObjectClass("vehicle.car", (1.95, 4.62, 1.73), (0.12, 0.35, 0.15), (190, 170, 35), 0.436, 0.95),
    "truck": ObjectClass("vehicle.truck", (2.51, 6.93, 2.84), (0.25, 1.0, 0.35), (215, 95, 45), 0.078, 0.65),
    "bus": ObjectClass("vehicle.bus.rigid", (2.93, 11.2, 3.47), (0.15, 1.0, 0.2), (40, 205, 240), 0.014, 0.8),
    "trailer": ObjectClass("vehicle.trailer", (2.90, 12.3, 3.87), (0.2, 1.5, 0.3), (225, 222, 220), 0.022, 0.6),
    "construction_vehicle": ObjectClass("vehicle.construction", (2.85, 6.37, 3.19), (0.3, 0.8, 0.3), (20, 140, 245), 0.013, 0.85),
    "pedestrian": ObjectClass("human.pedestrian.adult", (0.67, 0.73, 1.77), (0.06, 0.08, 0.1), (165, 45, 225), 0.194, 1.85),
    "motorcycle": ObjectClass("vehicle.motorcycle", (0.77, 2.11, 1.47), (0.08, 0.15, 0.1), (165, 35, 110), 0.011, 1.5),
    "bicycle": ObjectClass("vehicle.bicycle", (0.60, 1.70, 1.28), (0.06, 0.12, 0.1), (50, 175, 45), 0.010, 1.3),
    "traffic_cone": ObjectClass("movable_object.trafficcone", (0.41, 0.41, 1.07), (0.04, 0.04, 0.1), (15, 85, 255), 0.087, 1.4),
    "barrier": ObjectClass("movable_object.barrier", (2.53, 0.50, 0.98), (0.25, 0.05, 0.08), (45, 40, 205), 0.134, 1.15),
}
"""The detection classes by name."""

CATEGORIES = (
    "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.wheelchair", "human.pedestrian.stroller",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.construction_worker", "animal",
    "vehicle.car", "vehicle.motorcycle", "vehicle.bicycle", "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.truck",
    "vehicle.construction", "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.trailer",
    "movable_object.barrier", "movable_object.trafficcone", "movable_object.pushable_pullable", "movable_object.debris",
    "static_object.bicycle_rack",
)  # fmt: skip
"""Names of the records of the category table."""

ATTRIBUTES = (
    "vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
    "pedestrian.sitting_lying_down", "pedestrian.standing", "pedestrian.moving",
)  # fmt: skip
"""Names of the records of the attribute table."""
