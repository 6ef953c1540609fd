"""Writes a synthetic world that the unmodified nuScenes devkit can load: `python -m synthetic.generate --world micro --out data/micro`."""

import argparse
import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from qdbev.command import entry_point
from qdbev.data.nuscenes.files import TABLES
from qdbev.data.rig import CHANNELS
from synthetic.config import WORLDS, WorldConfig
from synthetic.scene_files import PARTS_FOLDER, part_path, replace_text, write_scene
from synthetic.tables import VERSION, world_tables

_log = logging.getLogger(__name__)

MARKER = "world.json"
"""File in a world's folder with its settings, and whether it is complete."""
FORMAT = 1
"""Version of the generator. Raise it when the same settings give other bytes than before."""


def generate(config: WorldConfig, root: Path, num_workers: int = 1) -> bool:
    """Write a world, or the missing part of one whose writing was interrupted.

    Args:
        root: a new or empty folder, or one with a part of a world of the same settings.
        num_workers: number of processes; the files do not depend on it.

    Returns:
        False if the world was complete already, otherwise True.

    Raises:
        ValueError: The folder contains something else, or a world of other settings.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers = {num_workers}; choose at least 1")
    if _is_complete(config, root):
        return False
    root.mkdir(parents=True, exist_ok=True)
    replace_text(root / MARKER, _marker_text(config))
    for folder in ("can_bus", "maps", PARTS_FOLDER, *(f"samples/{channel}" for channel in CHANNELS)):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _write_scenes(config, root, num_workers)
    replace_text(root / MARKER, _marker_text(config, _write_tables(config, root)))
    shutil.rmtree(root / PARTS_FOLDER)
    return True


def _is_complete(config: WorldConfig, root: Path) -> bool:
    """Return whether the folder contains the whole world. Raises ValueError if it contains anything but this world or a part of it."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    path = root / MARKER
    if not path.is_file():
        raise ValueError(f"{root} is not empty and has no {MARKER}, so it was not written by this command; choose another --out")
    try:
        marker = json.loads(path.read_text())
        found, asked = ({"format": part["format"], **part["config"]} for part in (marker, json.loads(_marker_text(config))))
        complete = bool(marker["complete"])
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); delete the folder, or choose another --out") from error
    for field in asked:
        if found.get(field) != asked[field]:
            raise ValueError(
                f"{root} contains another world: {field} is {found.get(field)!r} there, {asked[field]!r} was asked for; "
                "choose another --out, or delete the folder"
            )
    return complete


def _marker_text(config: WorldConfig, digest: str = "") -> str:
    """Content of the marker file of a world begun, or of a complete one with the digest of its content."""
    marker = {"format": FORMAT, "config": dataclasses.asdict(config), "digest": digest, "complete": digest != ""}
    return json.dumps(marker, indent=1) + "\n"


def _write_scenes(config: WorldConfig, root: Path, num_workers: int) -> None:
    names = config.scene_names
    missing = [name for name in names if not part_path(root, name).is_file()]
    written = _map(functools.partial(write_scene, root, config), missing, num_workers)
    for _ in tqdm(written, total=len(names), initial=len(names) - len(missing), desc=config.name, unit="scene"):
        pass


def _map(task: Callable[[str], None], names: list[str], num_workers: int) -> Iterator[None]:
    """Run the task for each scene name, in this process or in several; yields as each scene is written."""
    if num_workers == 1 or len(names) < 2:
        yield from map(task, names)
        return
    with multiprocessing.get_context("spawn").Pool(min(num_workers, len(names)), cv2.setNumThreads, (1,)) as pool:
        yield from pool.imap_unordered(task, names)


def _write_tables(config: WorldConfig, root: Path) -> str:
    """Merge the records of all scenes into the thirteen tables; returns a SHA-256 digest of the world's content."""
    digest = hashlib.sha256()
    tables = world_tables(config)
    for name in config.scene_names:
        part = json.loads(part_path(root, name).read_text())
        digest.update(part["files"].encode())
        for table, records in part["tables"].items():
            tables[table] += records
    cv2.imwrite(str(root / tables["map"][0]["filename"]), np.zeros((64, 64), np.uint8))
    partial, folder = root / f"{VERSION}.partial", root / VERSION
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    for table in TABLES:
        text = json.dumps(tables[table], indent=0)
        digest.update(text.encode())
        (partial / f"{table}.json").write_text(text)
    partial.replace(folder)
    return digest.hexdigest()


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Write a synthetic world in nuScenes format to a folder."""
    parser = argparse.ArgumentParser(prog="python -m synthetic.generate", description=main.__doc__)
    parser.add_argument("--world", required=True, choices=sorted(WORLDS), help="name of the world")
    parser.add_argument("--out", required=True, type=Path, help="folder to write it to")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--scenes", type=int, nargs=2, metavar=("TRAIN", "VAL"), help="number of scenes of each split")
    args = parser.parse_args(argv)
    config = WORLDS[args.world]()
    if args.scenes:
        config = dataclasses.replace(config, num_train=args.scenes[0], num_val=args.scenes[1])
    written = generate(config, args.out, args.workers)
    _log.info("%s: %s", args.out, "written" if written else "already complete, nothing to do")


if __name__ == "__main__":
    main()
