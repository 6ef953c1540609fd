"""Runs a training inside a test: one process on the CPU."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.untrained import untrained
from qdbev import artifact
from qdbev.config import Config, to_dict
from qdbev.facts import TeacherFacts
from qdbev.restore import restore
from train import loop, qat
from train.distributed import World

CPU = torch.device("cpu")


def untrained_teacher(config: Config, path: Path) -> Path:
    """Write a teacher with random weights, which depend on the seed of `config`, and return its path."""
    artifact.save_checkpoint(path, config=to_dict(config), weights=untrained(config).state_dict(), parent=None, facts=TeacherFacts())
    return path


def quantize(teacher: Path, student: Path, config: Config, resume: bool = False, **options: object) -> None:
    """Run `train.qat.train` on a teacher file in one process on the CPU."""
    qat.train(qat.Teacher(teacher, *restore(teacher, "teacher")), student, config, CPU, World(), resume, **options)


@contextlib.contextmanager
def interrupted_after(num_steps: int) -> Iterator[None]:
    """Interrupt the training that runs inside after `num_steps` steps, each of which saves a state."""
    real_step, calls = loop.train_step, itertools.count()

    def killed(*args: object) -> object:
        if next(calls) == num_steps:
            raise KeyboardInterrupt
        return real_step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", killed)
        patch.setattr(loop, "SAVE_EVERY_SECONDS", 0.0)
        yield
