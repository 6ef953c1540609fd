"""Training in several processes, with the same results as in one.

Launch with `torchrun --nproc-per-node N -m -- train.teacher ...`. The processes communicate through gloo on the CPU and nccl on GPUs.
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
    """The training processes as one of them sees them."""

    rank: int = 0
    """Index of this process."""
    size: int = 1
    """Number of processes."""

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and shows progress."""
        return self.rank == 0

    def mean(self, number: float) -> float:
        """Return the mean of a number over all processes."""
        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.size


@contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """Join the process group of a torchrun launch while the block runs; without torchrun there is one process and no group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, as torch.nn.SyncBatchNorm, which does not run on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) with the moments of all processes in training, with the stored ones otherwise."""
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
    """Replace every batch norm that trains on batch statistics by a `SyncedBatchNorm2d`, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d and child.weight.requires_grad:
                synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum).to(child.weight.device)
                synced.load_state_dict(child.state_dict())
                setattr(parent, name, synced)
