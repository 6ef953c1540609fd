"""Builds the `Infos` of a dataset from its tables and keeps them in a sealed file beside the tables, so that they are read only once.

python -m qdbev.data.build_infos --root data/nuscenes --version v1.0-trainval
"""

import argparse
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qdbev import artifact
from qdbev.can_bus import SIGNALS
from qdbev.command import entry_point
from qdbev.data.config import DataConfig
from qdbev.data.infos import DatasetError, Infos
from qdbev.data.nuscenes.files import fingerprint
from qdbev.facts import InfosFacts

_LAYOUT = 3
"""Version of the file's layout. Raise it when the arrays of `Infos` or their meaning change, so that older files are built again."""
_READABLE_LAYOUTS = (2, _LAYOUT)
"""Layouts that `_load` can open. Files of layout 2 have two more arrays, `prev` and `next`, which are ignored."""

_log = logging.getLogger(__name__)


def load_or_build(config: DataConfig) -> Infos:
    """Infos from the sealed file if the tables have not changed since it was written, otherwise from `build`."""
    root = Path(config.root)
    cached = _load(cache_path(root, config.version), fingerprint(root, config.version))
    return build(config) if cached is None else cached


def build(config: DataConfig) -> Infos:
    """Check that `config.version` is complete, read it with `config.workers` processes, write the sealed file and return the infos.

    Raises:
        DatasetError: Files are missing, all of which the message names, or the folder cannot be written to.
    """
    from qdbev.data.nuscenes import completeness, tables  # the devkit takes seconds to import and is needed only here

    root, version = Path(config.root), config.version
    _log.info("checking %s in %s", version, root)
    completeness.require(root, version)
    stamp = fingerprint(root, version)
    infos = tables.read(root, version, config.workers)
    path = cache_path(root, version)
    try:
        with artifact.atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{field.name: getattr(infos, field.name) for field in dataclasses.fields(infos)})
        identity = {"version": version, "layout": _LAYOUT}
        artifact.seal(path, config=identity, parent=None, facts=InfosFacts(**summary(infos), tables=stamp))
    except OSError as error:
        raise DatasetError(
            f"cannot write {path} ({error}); make the folder writable, or set data.root to a writable folder of links to the dataset"
        ) from error
    return infos


def cache_path(root: Path, version: str) -> Path:
    """Path of the sealed file with the infos of a version."""
    return root / f"qdbev_infos_{version}.npz"


def summary(infos: Infos) -> dict[str, Any]:
    """Numbers of samples, scenes, boxes, boxes with lidar or radar points, samples without CAN signals, and samples of each split."""
    return {
        "samples": len(infos),
        "scenes": len(np.unique(infos.scene_token)),
        "boxes": len(infos.boxes),
        "boxes_with_points": int((infos.num_points > 0).sum()),
        "samples_without_can_signals": int((infos.can_bus[:, SIGNALS] == 0).all(1).sum()),
        "splits": {name.decode(): int(inside.sum()) for name, inside in zip(infos.split_names, infos.in_split, strict=True)},
    }


def _load(path: Path, tables: dict[str, tuple[int, ...]]) -> Infos | None:
    """Infos from the sealed file, or None if it is missing, damaged, of an unknown layout, or made from tables other than `tables`."""
    try:
        seal = artifact.unseal(path, "infos")
    except artifact.ArtifactError:
        return None
    if seal.facts.tables != tables or seal.config.get("layout") not in _READABLE_LAYOUTS:
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return Infos(**{field.name: arrays[field.name] for field in dataclasses.fields(Infos)})


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Read a dataset's tables, write the infos and print how much is in them."""
    parser = argparse.ArgumentParser(prog="python -m qdbev.data.build_infos", description=main.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder in nuScenes format")
    parser.add_argument("--version", default="v1.0-trainval", help="folder of tables in it (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 0, help="reading processes (default: %(default)s)")
    args = parser.parse_args(argv)
    infos = build(DataConfig(root=str(args.root), version=args.version, workers=args.workers))
    lines = [f"{cache_path(args.root, args.version)}", *(f"  {name}: {value}" for name, value in summary(infos).items())]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
