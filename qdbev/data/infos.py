"""What is known of every key frame without opening an image: calibration, poses, CAN signals, boxes, file names.

nuScenes' tables are read once (tables.py) and kept as plain arrays in one sealed file per version beside them. `lidar2img` and
`can_bus` keep the names and the quirks of the code that trained the published checkpoints (BEVFormer 66b65f3,
tools/data_converter/nuscenes_converter.py and nuscenes_dataset.py).

    python -m qdbev.data.infos --root data/nuscenes --version v1.0-trainval
"""

import argparse
import dataclasses
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qdbev import artifact
from qdbev.command import entry_point
from qdbev.data.config import DataConfig
from qdbev.facts import InfosFacts

TABLES = (
    "category",
    "attribute",
    "visibility",
    "instance",
    "sensor",
    "calibrated_sensor",
    "ego_pose",
    "log",
    "scene",
    "sample",
    "sample_data",
    "sample_annotation",
    "map",
)
_LAYOUT = 2
"""Raised when the arrays of `Infos` or their meaning change, so that older files are made again."""

_log = logging.getLogger(__name__)


class DatasetError(ValueError):
    """A dataset, or a part of it, that is missing, damaged or does not fit together."""


class Info(NamedTuple):
    """One key frame. Lengths are metres, angles radians; N cameras in the order of `schema.CAMERAS`, G annotated boxes.

    image_files are relative to the dataset's root. lidar2img (N, 4, 4) maps the lidar frame at the key frame's time to pixels of the
    camera at its own, for the stored images. ego_from_lidar and global_from_ego (4, 4) are those of the lidar, and quaternion (4,)
    w, x, y, z is the rotation of the latter as the tables have it. can_bus (18,) is absolute, see `tables.can_bus`. boxes (G, 9) are
    as in `schema.Frame`, but neither filtered nor wrapped; labels (G,) index `schema.CLASSES`; num_points (G,) counts lidar and radar
    returns, zero where an object was annotated without being measured.
    """

    token: str
    scene_token: str
    prev: str
    next: str
    timestamp_us: int
    image_files: tuple[str, ...]
    lidar2img: np.ndarray
    ego_from_lidar: np.ndarray
    global_from_ego: np.ndarray
    quaternion: np.ndarray
    can_bus: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    num_points: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Infos:
    """All key frames of one version in order of time, as arrays that worker processes share.

    S samples, N cameras, G boxes of all samples together, K splits. Text is UTF-8 bytes. Fields are those of `Info`, stacked;
    sample s owns boxes box_start[s] to box_start[s + 1]; image_hw (2,) is the size of every image; in_split (K, S) says which sample
    belongs to which of split_names (K,).
    """

    token: np.ndarray
    scene_token: np.ndarray
    prev: np.ndarray
    next: np.ndarray
    timestamp_us: np.ndarray
    image_files: np.ndarray
    image_hw: np.ndarray
    lidar2img: np.ndarray
    ego_from_lidar: np.ndarray
    global_from_ego: np.ndarray
    quaternion: np.ndarray
    can_bus: np.ndarray
    box_start: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    num_points: np.ndarray
    split_names: np.ndarray
    in_split: np.ndarray

    def __len__(self) -> int:
        return len(self.token)

    def __getitem__(self, index: int) -> Info:
        own = slice(self.box_start[index], self.box_start[index + 1])
        return Info(
            token=self.token[index].decode(),
            scene_token=self.scene_token[index].decode(),
            prev=self.prev[index].decode(),
            next=self.next[index].decode(),
            timestamp_us=int(self.timestamp_us[index]),
            image_files=tuple(name.decode() for name in self.image_files[index]),
            lidar2img=self.lidar2img[index],
            ego_from_lidar=self.ego_from_lidar[index],
            global_from_ego=self.global_from_ego[index],
            quaternion=self.quaternion[index],
            can_bus=self.can_bus[index],
            boxes=self.boxes[own],
            labels=self.labels[own],
            num_points=self.num_points[own],
        )

    def split(self, name: str) -> np.ndarray:
        """(n,) indices of the split's samples, in order of time.

        Raises:
            DatasetError: The split is unknown or has no scene in this version.
        """
        known = [text.decode() for text in self.split_names]
        if name not in known:
            raise DatasetError(f"there is no split {name!r} in this version; it has {', '.join(known) or 'none'}")
        return np.flatnonzero(self.in_split[known.index(name)])


def load_or_build(config: DataConfig) -> Infos:
    """Infos of `config.version`, from the sealed file where it is still true, otherwise read from the tables and kept.

    Raises:
        DatasetError: The dataset is missing, incomplete or cannot be written to.
    """
    root = Path(config.root)
    tables = fingerprint(root, config.version)
    cached = _load(cache_path(root, config.version), tables)
    return build(root, config.version, config.workers) if cached is None else cached


def build(root: Path, version: str, workers: int) -> Infos:
    """Check that the version is complete, read it with so many processes (0: this one), keep the result as a sealed file and return it.

    Raises:
        DatasetError: As `load_or_build`; one report names all that is missing.
    """
    from qdbev.data import completeness, tables  # costs seconds (the devkit brings matplotlib and scikit-learn), needed only here

    _log.info("checking %s in %s", version, root)
    completeness.require(root, version)
    stamp = fingerprint(root, version)
    infos = tables.read(root, version, workers)
    path = cache_path(root, version)
    try:
        with artifact.atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{field.name: getattr(infos, field.name) for field in dataclasses.fields(infos)})
        artifact.seal(path, config=_identity(version), parent=None, facts=InfosFacts(**summary(infos), tables=stamp))
    except OSError as error:
        raise DatasetError(f"cannot write {path} ({error}); make the folder writable, or a folder of links to the dataset") from error
    return infos


def cache_path(root: Path, version: str) -> Path:
    """Where the infos of a version are kept."""
    return root / f"qdbev_infos_{version}.npz"


def summary(infos: Infos) -> dict[str, Any]:
    """Counts of samples, scenes and boxes, of boxes measured by a sensor, and of samples per split and without CAN signals."""
    return {
        "samples": len(infos),
        "scenes": len(np.unique(infos.scene_token)),
        "boxes": len(infos.boxes),
        "boxes_with_points": int((infos.num_points > 0).sum()),
        "samples_without_can_signals": int((infos.can_bus[:, 7:16] == 0).all(1).sum()),
        "splits": {name.decode(): int(inside.sum()) for name, inside in zip(infos.split_names, infos.in_split, strict=True)},
    }


def fingerprint(root: Path, version: str) -> dict[str, tuple[int, ...]]:
    """Size and time of change of each table, and the number of CAN files: what tells a changed dataset from the same one."""
    folder, can_bus = root / version, root / "can_bus"
    files = [path for path in (*(folder / f"{name}.json" for name in TABLES), folder / "splits.json") if path.is_file()]
    stamp = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    signals = os.listdir(can_bus) if can_bus.is_dir() else []  # noqa: PTH208 (8000 names)
    return {**stamp, "can_bus": (sum(name.endswith("_pose.json") for name in signals),)}


def _load(path: Path, tables: dict[str, tuple[int, ...]]) -> Infos | None:
    """The kept infos, or None where there are none, they are damaged, or the tables have changed since."""
    try:
        seal = artifact.unseal(path, "infos")
    except artifact.ArtifactError:
        return None
    if seal.facts.tables != tables or seal.config.get("layout") != _LAYOUT:
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return Infos(**arrays)


def _identity(version: str) -> dict[str, Any]:
    return {"version": version, "layout": _LAYOUT}


@entry_point
def main() -> None:
    """Read a dataset's tables, keep the infos and print what is in them."""
    parser = argparse.ArgumentParser(prog="python -m qdbev.data.infos", description=main.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder in nuScenes format")
    parser.add_argument("--version", default="v1.0-trainval", help="folder of tables in it (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 0, help="reading processes (default: %(default)s)")
    args = parser.parse_args()
    infos = build(args.root, args.version, args.workers)
    lines = [f"{cache_path(args.root, args.version)}", *(f"  {name}: {value}" for name, value in summary(infos).items())]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
