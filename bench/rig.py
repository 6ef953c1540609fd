"""The synthetic cameras as tensors, for the benchmarks' projections."""

import torch
from torch import Tensor

from qdbev.config import Config
from qdbev.data.rig import network_rig


def rig(config: Config) -> tuple[Tensor, tuple[int, int]]:
    """Return lidar2img (1, N, 4, 4) of the synthetic cameras, and height and width in pixels of the padded images."""
    lidar2img, padded_hw = network_rig(config.data)
    return torch.from_numpy(lidar2img).float()[None], padded_hw
