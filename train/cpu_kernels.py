"""Lets training on a CPU use the kernels of plugins/cpu."""

import torch


def use_cpu_kernels(device: torch.device) -> None:
    """Run the attentions with the CPU kernels in this process, if it trains on a CPU and a compiler is here; else PyTorch code runs."""
    if device.type == "cpu":
        from plugins import torch_ops  # a room of its own, which only this place of training needs

        torch_ops.install_on_cpu()
