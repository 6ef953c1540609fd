"""What several test files need: the shared reference numbers where they are at hand, and a small synthetic world."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from synthetic.config import WORLDS

# Nets here are small: two threads on busy cores wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers at every run, whichever run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Folder of the numbers produced by the official code; the test skips where it is absent."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"needs the official code's numbers in {folder}")
    return folder


@pytest.fixture(scope="session")
def golden_micro(golden_folder: Path) -> dict[str, np.ndarray]:
    """Arrays of the shrunken tiny model."""
    with np.load(golden_folder / "golden_micro.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_modules(golden_folder: Path) -> dict[str, np.ndarray]:
    """Arrays of single modules."""
    with np.load(golden_folder / "golden_modules.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a synthetic world: 2 train and 1 val scene of 4 key frames, 180x320 images, tables in v1.0-trainval."""
    from synthetic.generate import generate  # takes cv2 along, which no test of a kernel needs

    root = tmp_path_factory.mktemp("world") / "tiny"
    generate(dataclasses.replace(WORLDS["micro"](), name="tiny", num_train=2, num_val=1, num_samples=4), root)
    return root
