"""One process or many: the same numbers.

Launch with `torchrun --nproc-per-node N -m train.teacher ...`; gloo on the CPU, nccl on GPUs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def mean(self, number: float) -> float:
        """Mean of a number over all processes."""
        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.size


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """The process group of a torchrun launch, or a world of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes; what torch.nn.SyncBatchNorm is, on the CPU too."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        moments = torch.stack((x.mean((0, 2, 3)), x.square().mean((0, 2, 3)))) / dist.get_world_size()
        mean, square = dist_fn.all_reduce(moments).unbind()
        variance = square - mean.square()
        if self.track_running_stats:
            count = x.numel() // x.shape[1] * dist.get_world_size()
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
                self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def sync_batch_norm(model: nn.Module) -> None:
    """Replace, in place, every batch norm that trains on batch statistics."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d and child.weight.requires_grad:
                synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum).to(child.weight.device)
                synced.load_state_dict(child.state_dict())
                setattr(parent, name, synced)
