"""The tables of the nuScenes v1.0 schema, and a fingerprint that shows whether a dataset's tables have changed.

Schema: nuscenes-devkit 1.2.0, docs/schema_nuscenes.md.
"""

import os
from pathlib import Path

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
"""Names of the thirteen tables; each is the file `<root>/<version>/<name>.json`."""


def fingerprint(root: Path, version: str) -> dict[str, tuple[int, ...]]:
    """Size in bytes and modification time in nanoseconds of each table and of `splits.json`, and the number of CAN pose files."""
    folder, can_bus = root / version, root / "can_bus"
    files = [path for path in (*(folder / f"{name}.json" for name in TABLES), folder / "splits.json") if path.is_file()]
    stamp = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    signals = os.listdir(can_bus) if can_bus.is_dir() else []  # noqa: PTH208 (there are 8000 names)
    return {**stamp, "can_bus": (sum(name.endswith("_pose.json") for name in signals),)}
