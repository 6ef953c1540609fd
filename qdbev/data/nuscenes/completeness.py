"""Checks that a dataset in nuScenes format is complete, and reports everything that is missing in one message before reading begins.

Archives: https://www.nuscenes.org/nuscenes#download. Which scenes each archive contains: nuscenes-devkit issues 573 and 636. Lidar and
radar files, sweeps and the map expansion are not needed.
"""

import json
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from nuscenes.can_bus.can_bus_api import NuScenesCanBus

from qdbev.data.infos import DatasetError
from qdbev.data.nuscenes.files import TABLES
from qdbev.schema import CAMERAS

_REMEDY = (
    "unpack the archives of https://www.nuscenes.org/nuscenes#download in the dataset's root; if this is a synthetic world, delete it and "
    "generate it again"
)


class _Archives(NamedTuple):
    """Names of the archives that contain the tables and map masks, and the images."""

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
"""Archives of each official version; the key is the part of the version's name after its last hyphen."""


def _key_frame(record: dict[str, Any]) -> tuple[str, str, str] | None:
    """File name, sample token and calibration token of a sample_data record, or None if it is not a key frame."""
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
"""Tables that the check reads, with the fields it takes from each record. Nine tenths of sample_data.json are not key frames and are
dropped while the file is parsed."""


def require(root: Path, version: str) -> None:
    """Raise a DatasetError that lists all tables, map masks, CAN signals and images that `version` lacks."""
    if not root.is_dir():
        raise DatasetError(f"no dataset at {root}: no such folder; set data.root to one in nuScenes format, or make one with `make demo`")
    if lines := missing(root, version):
        raise DatasetError("\n  ".join([f"{root} is not complete for {version}:", *lines, _REMEDY]))


def missing(root: Path, version: str) -> list[str]:
    """One line for each kind of missing file, with the archive that contains it; an empty list for a complete dataset."""
    archives = _ARCHIVES.get(version.rpartition("-")[2], _Archives(f"the metadata of {version}", f"the images of {version}"))
    if not (root / version).is_dir():
        found = sorted(path.parent.name for path in root.glob("*/sample.json")) or ["no version"]
        lines, tables = [f"{version}: no such folder, there is {', '.join(found)}; unpack {archives.metadata}, or set data.version"], {}
    else:
        lines, tables = _read(root / version, archives)
    masks = tables.get("map", [])
    if absent := [name for name in masks if not (root / name).is_file()]:
        lines.append(f"maps: {len(absent)} of {len(masks)} masks missing, first {absent[0]}; unpack {archives.metadata}")
    lines += _missing_can_signals(root, [name for _, name in tables.get("scene", [])])
    all_read = len(tables) == len(_NEEDED)
    return lines + (_missing_images(root, tables, archives) if all_read else _empty_folders(root, archives))


def scenes_without_can_signals(root: Path) -> set[str]:
    """Names of the scenes for which nuScenes published no CAN signals, from the devkit's list."""
    return {f"scene-{number:04d}" for number in NuScenesCanBus(str(root)).can_blacklist}


def _read(folder: Path, archives: _Archives) -> tuple[list[str], dict[str, list[Any]]]:
    """Lines about missing and damaged tables, and the needed fields of the others."""
    absent = [f"{name}.json" for name in TABLES if not (folder / f"{name}.json").is_file()]
    lines = [f"{folder.name}: {', '.join(absent)} missing; unpack {archives.metadata}"] if absent else []
    tables = {}
    for name, needed in _NEEDED.items():
        path = folder / f"{name}.json"
        if path.is_file():
            try:
                tables[name] = [fields for fields in json.loads(path.read_text(), object_hook=needed) if fields is not None]
            except (ValueError, KeyError, TypeError) as error:
                lines.append(f"{folder.name}/{path.name}: damaged ({error!r}); unpack {archives.metadata} again")
    return lines, tables


def _missing_can_signals(root: Path, scenes: list[str]) -> list[str]:
    if not (root / "can_bus").is_dir():
        return ["can_bus: no such folder; the vehicle's motion is in the CAN bus expansion: unpack can_bus.zip"]
    expected = [f"{name}_pose.json" for name in scenes if name not in scenes_without_can_signals(root)]
    absent = _absent(root / "can_bus", expected)
    return [f"can_bus: {len(absent)} of {len(expected)} scenes missing, first {absent[0]}; unpack can_bus.zip"] if absent else []


def _missing_images(root: Path, tables: dict[str, list[Any]], archives: _Archives) -> list[str]:
    """One line for each folder with missing images, and one line that names the scenes concerned."""
    channels, scenes, samples = dict(tables["sensor"]), dict(tables["scene"]), dict(tables["sample"])
    cameras = {token for token, sensor in tables["calibrated_sensor"] if channels.get(sensor) in CAMERAS}
    folders: dict[str, dict[str, str]] = {}
    for filename, sample, calibration in tables["sample_data"]:
        if calibration in cameras:
            folder, _, name = filename.rpartition("/")
            folders.setdefault(folder, {})[name] = sample
    lines, incomplete = [], set()
    for folder, names in sorted(folders.items()):
        if absent := _absent(root / folder, names):
            lines.append(f"{folder}: {len(absent)} of {len(names)} images missing, first {absent[0]}")
            incomplete |= {scenes.get(samples.get(names[name]), "unknown") for name in absent}
    if lines:
        scope = f"{len(incomplete)} of {len(scenes)} scenes, {min(incomplete)} to {max(incomplete)}"
        lines.append(f"images are missing in {scope}; unpack {archives.images}")
    return lines


def _empty_folders(root: Path, archives: _Archives) -> list[str]:
    """A line about camera folders without any image, for use while the tables with the file names are incomplete."""
    empty = [f"samples/{camera}" for camera in CAMERAS if not any((root / "samples" / camera).glob("*"))]
    known = f"no images in {', '.join(empty)}; unpack {archives.images}" if empty else "each of the six camera folders has some"
    return [f"images: {known}; they can be counted once the tables are complete"]


def _absent(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not in the folder. The folder is listed once, as one query per file is slow on network disks."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return sorted(name for name in names if name not in present)
