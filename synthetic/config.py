"""Settings of a synthetic world, and the two named worlds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from synthetic.scene_names import TRAIN_NAMES, VAL_NAMES

KEY_FRAME_INTERVAL = 0.5
"""Seconds between key frames; nuScenes annotates at 2 Hz."""


@dataclass(frozen=True)
class WorldConfig:
    """All settings of a world; together they determine every byte of it. The defaults are the world `micro`.

    Attributes:
        name: the world's name; also its key in `WORLDS`.
        layout: `square` places all classes in equal numbers around the ego; `street` places them on lanes, kerbs and pavements.
        palette: `class` gives each class one hue; `natural` gives road users everyday colours.
        num_train: number of scenes, with names of the official train split.
        num_val: number of scenes, with names of the official val split.
        num_samples: key frames per scene.
        image_hw: height and width of the images; 16:9, because the cameras' intrinsics are scaled from 1600 x 900, not cropped.
        annotation_radius: only objects whose centre is within this distance of the ego in metres are annotated.
        reach: greatest distance in metres along the road, ahead of and behind the ego, at which objects are placed.
        ego_speed: lowest and highest speed of the ego at the start of a scene, in m/s.
        max_curvature: greatest curvature of a road in 1/m, to the left or to the right.
        object_density: number of objects placed per metre of road within reach.
        mean_annotated: fewest and most objects in range, as a mean over a scene's key frames; other scenes are drawn again.
        buildings: whether there are house fronts along the road.
        texel: metres per pixel of the ground texture.
        lidar_columns: firings of the lidar per revolution. The numbers of lidar points in boxes come from all of them.
        lidar_stride: every n-th lidar point is written to disk.
        jpeg_quality: 1 to 100.
        full_can_bus: write all eight CAN messages, not only `pose`, `route` and `meta`.
        seed: seed of all random numbers.
    """

    name: str = "micro"
    layout: Literal["square", "street"] = "square"
    palette: Literal["class", "natural"] = "class"
    num_train: int = 192
    num_val: int = 30
    num_samples: int = 8
    image_hw: tuple[int, int] = (180, 320)
    annotation_radius: float = 30.0
    reach: float = 26.0
    ego_speed: tuple[float, float] = (2.0, 8.0)
    max_curvature: float = 0.006
    object_density: float = 0.18
    mean_annotated: tuple[float, float] = (8.0, 14.0)
    buildings: bool = False
    texel: float = 0.25
    lidar_columns: int = 1084
    lidar_stride: int = 16
    jpeg_quality: int = 85
    full_can_bus: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field. Raises ValueError if a field has a value that is not allowed; the message names both and what is allowed."""
        height, width = self.image_hw
        slowest, fastest = self.ego_speed
        fewest, most = self.mean_annotated
        num_train, num_val = len(TRAIN_NAMES), len(VAL_NAMES)
        checks = {
            "layout": (self.layout in ("square", "street"), "'square' or 'street'"),
            "palette": (self.palette in ("class", "natural"), "'class' or 'natural'"),
            "num_train": (0 <= self.num_train <= num_train, f"0 to {num_train}"),
            "num_val": (0 <= self.num_val <= num_val and self.num_train + self.num_val > 0, f"0 to {num_val}, at least one scene in all"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "image_hw": (height >= 36 and width * 9 == height * 16, "(height, width) with width : height = 16 : 9 and height >= 36"),
            "annotation_radius": (self.annotation_radius > 0, "a positive distance"),
            "reach": (self.reach > 0, "a positive distance"),
            "ego_speed": (0 <= slowest <= fastest, "(lowest, highest) with 0 <= lowest <= highest"),
            "max_curvature": (0 <= self.max_curvature <= 0.02, "0 to 0.02 per metre"),
            "object_density": (self.object_density > 0, "a positive number of objects per metre"),
            "mean_annotated": (0 <= fewest < most, "(fewest, most) with 0 <= fewest < most"),
            "texel": (self.texel > 0, "a positive size in metres"),
            "lidar_columns": (self.lidar_columns >= 36, "at least 36"),
            "lidar_stride": (self.lidar_stride >= 1, "at least 1"),
            "jpeg_quality": (1 <= self.jpeg_quality <= 100, "1 to 100"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for field, (holds, allowed) in checks.items():
            if not holds:
                raise ValueError(f"world {self.name!r}: {field} = {getattr(self, field)!r} is not allowed; choose {allowed}")

    @property
    def duration(self) -> float:
        """Seconds from the first to the last key frame of a scene."""
        return (self.num_samples - 1) * KEY_FRAME_INTERVAL

    @property
    def scene_names(self) -> tuple[str, ...]:
        """Names of all scenes, train before val, from the official splits."""
        return TRAIN_NAMES[: self.num_train] + VAL_NAMES[: self.num_val]


def micro() -> WorldConfig:
    """A small world on which a detector can be trained in minutes: ten classes in equal numbers, near the ego, one colour for each class.

    192 train and 30 val scenes of 8 key frames with images of 320 x 180. About a dozen objects in a frame stand or move within 30 m
    beside an almost straight road, so that they seldom hide each other and all objects in range are annotated.
    """
    return WorldConfig()


def street() -> WorldConfig:
    """A world with the statistics of nuScenes v1.0-trainval: images of 1600 x 900, class frequencies, object sizes and numbers of objects.

    Scenes of 40 key frames on a two-way street with rows of parked cars, pavements and house fronts. Rare classes are as rare as in
    nuScenes, so a single scene need not contain all ten classes.
    """
    return WorldConfig(
        name="street",
        layout="street",
        palette="natural",
        num_train=8,
        num_val=2,
        num_samples=40,
        image_hw=(900, 1600),
        annotation_radius=70.0,
        reach=70.0,
        ego_speed=(3.5, 9.0),
        object_density=0.34,
        mean_annotated=(20.0, 120.0),
        buildings=True,
        texel=0.12,
        lidar_stride=4,
        full_can_bus=True,
    )


WORLDS: dict[str, Callable[[], WorldConfig]] = {"micro": micro, "street": street}
"""The named worlds."""
