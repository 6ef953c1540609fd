"""Writes the files of this folder from the full output of the official code: `python tests/golden/compact.py FOLDER`.

FOLDER holds golden_micro.npz, golden_modules.npz, keys_{micro,tiny,small,base}.json and checksums.txt; README.md says how they were
made. Every array that a test compares is kept bit by bit: together the files have 2 MB, so that nothing had to be rounded or sampled.
The same input gives the same bytes.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

UNUSED = ("gt_bottom_centre_boxes", "info_lidar2img")
"""Arrays that are left out because no test compares them: the first is an input, the second is a product of two inputs."""

NETWORKS = ("micro", "tiny", "small", "base")
"""Networks whose official keys and shapes are kept."""

ABSENT_NETWORK = "micro_base/"
"""Beginning of the checksums that are left out, because the results of that network are not in FOLDER."""


def write(source: Path, target: Path) -> None:
    """Write micro.npz, modules.npz, key_shapes.json.gz and checksums.txt to the folder `target`."""
    for name in ("micro", "modules"):
        with np.load(source / f"golden_{name}.npz") as arrays:
            np.savez_compressed(target / f"{name}.npz", **{key: array for key, array in arrays.items() if key not in UNUSED})
    shapes = {name: json.loads((source / f"keys_{name}.json").read_text()) for name in NETWORKS}
    text = json.dumps(shapes, separators=(",", ":"))
    (target / "key_shapes.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    lines = (source / "checksums.txt").read_text().splitlines()
    kept = [line for line in lines if line and not line.startswith(ABSENT_NETWORK)]
    (target / "checksums.txt").write_text("\n".join(kept) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the full output of the official code")
    write(parser.parse_args().folder, Path(__file__).parent)
