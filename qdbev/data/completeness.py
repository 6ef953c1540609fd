"""Whether a dataset in nuScenes format is all there, told in one report before anything is read from it.

Archives: https://www.nuscenes.org/nuscenes#download; which scenes a part holds: nuscenes-devkit issues 573 and 636. Lidar and radar
files, sweeps and the map expansion are not needed.
"""

import json
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from nuscenes.can_bus.can_bus_api import NuScenesCanBus

from qdbev.data.infos import TABLES, DatasetError
from qdbev.schema import CAMERAS

_WHERE = "archives: https://www.nuscenes.org/nuscenes#download, unpacked in the dataset's root; a synthetic world: delete it, make it again"


class _Archives(NamedTuple):
    """What to unpack for the tables and map masks, and for the images."""

    metadata: str
    images: str


_ARCHIVES = {
    "trainval": _Archives(
        "v1.0-trainval_meta.tgz",
        "v1.0-trainval01_keyframes.tgz to v1.0-trainval10_keyframes.tgz (or _blobs_camera, _blobs), of 85 scenes each in order of name",
    ),
    "mini": _Archives("v1.0-mini.tgz", "v1.0-mini.tgz"),
    "test": _Archives("v1.0-test_meta.tgz", "v1.0-test_blobs_camera.tgz (or _blobs)"),
}
"""By the ending of the version's name."""


def _key_frame(record: dict[str, Any]) -> tuple[str, str, str] | None:
    fields = record["filename"], record["sample_token"], record["calibrated_sensor_token"]
    return fields if record["is_key_frame"] else None


_NEEDED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "map": itemgetter("filename"),
    "scene": itemgetter("token", "name"),
    "sample": itemgetter("token", "scene_token"),
    "sensor": itemgetter("token", "channel"),
    "calibrated_sensor": itemgetter("token", "sensor_token"),
    "sample_data": _key_frame,
}
"""What is read of each table; most of sample_data.json lies between key frames and is not kept."""


def require(root: Path, version: str) -> None:
    """Raise DatasetError that names all that `version` lacks: tables, map masks, CAN signals, images."""
    if not root.is_dir():
        raise DatasetError(f"no dataset at {root}: no such folder; set data.root to one in nuScenes format, or make one with `make demo`")
    if lines := missing(root, version):
        raise DatasetError("\n  ".join([f"{root} is not complete for {version}:", *lines, _WHERE]))


def missing(root: Path, version: str) -> list[str]:
    """One line per thing that is not there, with what to unpack; empty for a complete dataset."""
    archives = _ARCHIVES.get(version.rpartition("-")[2], _Archives(f"the metadata of {version}", f"the images of {version}"))
    if not (root / version).is_dir():
        found = sorted(path.parent.name for path in root.glob("*/sample.json")) or ["no version"]
        lines, tables = [f"{version}: no such folder, there is {', '.join(found)}; unpack {archives.metadata}, or set data.version"], {}
    else:
        lines, tables = _read(root / version, archives)
    lines += _missing_maps(root, tables.get("map", []), archives)
    lines += _missing_can_signals(root, [name for _, name in tables.get("scene", [])])
    whole = len(tables) == len(_NEEDED)
    return lines + (_missing_images(root, tables, archives) if whole else _empty_folders(root, archives))


def scenes_without_can_signals(root: Path) -> set[str]:
    """Names of the scenes for which nuScenes has no CAN signals, by the devkit's list."""
    return {f"scene-{number:04d}" for number in NuScenesCanBus(str(root)).can_blacklist}


def _read(folder: Path, archives: _Archives) -> tuple[list[str], dict[str, list[Any]]]:
    """Lines about missing and damaged tables, and what is needed of the others."""
    absent = [f"{name}.json" for name in TABLES if not (folder / f"{name}.json").is_file()]
    lines = [f"{folder.name}: {', '.join(absent)} missing; unpack {archives.metadata}"] if absent else []
    tables = {}
    for name, needed in _NEEDED.items():
        path = folder / f"{name}.json"
        if path.is_file():
            try:
                tables[name] = [row for row in json.loads(path.read_text(), object_hook=needed) if row is not None]
            except (ValueError, KeyError, TypeError) as error:
                lines.append(f"{folder.name}/{path.name}: damaged ({error!r}); unpack {archives.metadata} again")
    return lines, tables


def _missing_maps(root: Path, names: list[str], archives: _Archives) -> list[str]:
    gone = [name for name in names if not (root / name).is_file()]
    return [f"maps: {len(gone)} of {len(names)} masks missing, first {gone[0]}; unpack {archives.metadata}"] if gone else []


def _missing_can_signals(root: Path, scenes: list[str]) -> list[str]:
    if not (root / "can_bus").is_dir():
        return ["can_bus: no such folder; the vehicle's motion comes from the CAN bus expansion: unpack can_bus.zip"]
    expected = [f"{name}_pose.json" for name in scenes if name not in scenes_without_can_signals(root)]
    gone = _absent(root / "can_bus", expected)
    return [f"can_bus: {len(gone)} of {len(expected)} scenes missing, first {gone[0]}; unpack can_bus.zip"] if gone else []


def _missing_images(root: Path, tables: dict[str, list[Any]], archives: _Archives) -> list[str]:
    """A line per folder with missing images, and one that says in which scenes."""
    channels, scenes, samples = dict(tables["sensor"]), dict(tables["scene"]), dict(tables["sample"])
    cameras = {token for token, sensor in tables["calibrated_sensor"] if channels.get(sensor) in CAMERAS}
    folders: dict[str, dict[str, str]] = {}
    for filename, sample, calibration in tables["sample_data"]:
        if calibration in cameras:
            folder, _, name = filename.rpartition("/")
            folders.setdefault(folder, {})[name] = sample
    lines, touched = [], set()
    for folder, names in sorted(folders.items()):
        if gone := _absent(root / folder, names):
            lines.append(f"{folder}: {len(gone)} of {len(names)} images missing, first {gone[0]}")
            touched |= {scenes.get(samples.get(names[name]), "unknown") for name in gone}
    if lines:
        scope = f"{len(touched)} of {len(scenes)} scenes, {min(touched)} to {max(touched)}"
        lines.append(f"images are missing in {scope}; unpack {archives.images}")
    return lines


def _empty_folders(root: Path, archives: _Archives) -> list[str]:
    """What can be said of the images while the tables that name them are not whole."""
    empty = [f"samples/{camera}" for camera in CAMERAS if not any((root / "samples" / camera).glob("*"))]
    known = f"no images in {', '.join(empty)}; unpack {archives.images}" if empty else "none of the six camera folders is empty"
    return [f"images: {known}; they can be counted when the tables are there"]


def _absent(folder: Path, names: Iterable[str]) -> list[str]:
    """Names that are not in the folder, which is listed once: a look at every file is slow on network disks."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return sorted(name for name in names if name not in present)
