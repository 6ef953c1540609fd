"""Fixtures that several test files share: numbers of the official code, and a small synthetic world."""

import dataclasses
import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import arrays

from qdbev.ops import kernels
from synthetic.config import WORLDS

# The networks of the tests are small: several threads would spend more time waiting for each other than computing.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# What is imported by now stays: looking through it for garbage again and again takes a sixth of the time of an export.
gc.freeze()
gc.set_threshold(50_000, 20, 50)


_LONGEST = ("export_pack", "export_to_onnx", "export_graphs", "train_stages", "train_sensitivity", "train_golden", "export_deform_conv")
"""Files of tests that take longest. They come first, so that no worker is left alone with one of them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in _LONGEST)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed PyTorch, so that a test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def pytorch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the functions of qdbev/ops run PyTorch code again, if a test before has installed the CPU kernels in this process."""
    monkeypatch.setattr(kernels, "_TRAINED_ON", set())


@pytest.fixture(scope="session")
def golden_micro() -> dict[str, np.ndarray]:
    """Return the official results of the shrunken tiny network, by name (see golden/README.md)."""
    return arrays("micro")


@pytest.fixture(scope="session")
def golden_modules() -> dict[str, np.ndarray]:
    """Return the official results of modules that were run alone, by name (see golden/README.md)."""
    return arrays("modules")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a synthetic world: 2 train and 1 val scene of 4 key frames, 180x320 images, tables in v1.0-trainval."""
    from synthetic.generate import generate  # imported here because it imports cv2, which the tests of the kernels must not need

    root = tmp_path_factory.mktemp("world") / "tiny"
    generate(dataclasses.replace(WORLDS["micro"](), name="tiny", num_train=2, num_val=1, num_samples=4), root)
    return root
