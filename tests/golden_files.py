"""Reads the golden numbers kept in tests/golden/; its README.md says where they come from."""

import gzip
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("golden")


def arrays(name: str) -> dict[str, np.ndarray]:
    """Read the official results by name: `micro` (the shrunken network) or `modules` (modules that were run alone)."""
    with np.load(FOLDER / f"{name}.npz") as content:
        return dict(content)


def key_shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Read the official state dict's keys and shapes, in the official order: `micro`, `tiny`, `small` or `base`."""
    content = json.loads(gzip.decompress((FOLDER / "key_shapes.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in content[network].items()}


def input_checksums() -> dict[str, str]:
    """Read the checksums of the weights and inputs that the official code was given: name, and first 16 digits of the SHA-256."""
    lines = (FOLDER / "checksums.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[-1] for line in lines}
