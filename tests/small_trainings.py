"""Runs a training inside a test: one process on the CPU."""

from pathlib import Path

import torch

from qdbev.config import Config
from train import qat
from train.distributed import World

CPU = torch.device("cpu")


def quantize(teacher: Path, student: Path, config: Config, resume: bool = False, **options: object) -> None:
    """Run `train.qat.train` on a teacher file in one process on the CPU."""
    qat.train(qat.Teacher.open(teacher), student, config, CPU, World(), resume, **options)
