"""Says for which tensors the custom operators have a kernel in this process, so that the functions of this folder call the operators."""

import torch
from torch import Tensor

_TRAINED_ON: set[str] = set()
"""Types of devices on which the kernels have gradients."""


def have_gradients_on(device_type: str) -> None:
    """Note that the kernels for a type of device are registered with PyTorch and have gradients."""
    _TRAINED_ON.add(device_type)


def run_operator(*tensors: Tensor) -> bool:
    """True if a custom operator shall compute these inputs, False if PyTorch code shall.

    It is true for CUDA tensors of which none needs a gradient now, and, where kernels have gradients, for float32 tensors. During an export
    it is always true: the operator becomes one ONNX node.
    """
    if torch.compiler.is_exporting():
        return True
    if have_gradients(*tensors):
        return True
    device = tensors[0].device.type
    return device == "cuda" and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def have_gradients(*tensors: Tensor) -> bool:
    """True for float32 tensors on a device whose kernels have gradients."""
    return tensors[0].device.type in _TRAINED_ON and all(tensor.dtype == torch.float32 for tensor in tensors)
