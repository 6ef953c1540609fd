"""Register the kernels with PyTorch, so that the operators of qdbev/ops run on them for CUDA tensors.

After `install()`, `torch.ops.qdbev.<operator>` runs the kernel on CUDA tensors and has a gradient. The functions of qdbev/ops run the
kernel too if no gradient is needed; with a gradient they run PyTorch code. Without a kernel for the sizes or the GPU, an error is raised.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from plugins.launch import compute
from plugins.operators import KERNELS
from qdbev.ops.contract import DOMAIN, MSDA, SCA, Operator
from qdbev.ops.msda import multi_scale_deformable_attention
from qdbev.ops.sca import dense_spatial_cross_attention


def _with_pairs(form: Callable[..., Tensor], *given: Any) -> Tensor:
    """Call `form`, whose last argument is [(h0, w0), ...], with h0, w0, ... in its place, as the contract says."""
    *tensors, flat = given
    return form(*tensors, list(zip(flat[::2], flat[1::2], strict=True)))


_DIFFERENTIABLE: dict[Operator, Callable[..., Tensor]] = {
    MSDA: functools.partial(_with_pairs, multi_scale_deformable_attention),
    SCA: functools.partial(_with_pairs, dense_spatial_cross_attention),
}
"""PyTorch code with the gradient of each operator, called as the contract says; traceable, as its shapes depend on no values."""


@functools.cache
def install() -> None:
    """Register all kernels and gradients with PyTorch; calling it again does nothing."""
    for operator in KERNELS:
        if not operator.has_integer_value:  # PyTorch has no operators for the int8 forms
            library.register_kernel(f"{DOMAIN}::{operator.torch_name}", "cuda", evaluation(operator))
    for operator, form in _DIFFERENTIABLE.items():
        save, backward = functools.partial(_save_inputs, operator), functools.partial(_differentiate, form)
        library.register_autograd(f"{DOMAIN}::{operator.torch_name}", backward, setup_context=save)


def evaluation(operator: Operator) -> Callable[..., Tensor]:
    """Return the function that PyTorch calls for CUDA tensors. It takes the operator's inputs and then its attributes."""

    def evaluate(*given: Any) -> Tensor:
        inputs, values = given[: len(operator.inputs)], given[len(operator.inputs) :]
        named = zip(operator.attributes.items(), values, strict=True)
        return compute(operator, inputs, {name: value if kind == "ints" else (value,) for (name, kind), value in named})

    return evaluate


def _save_inputs(operator: Operator, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    count = len(operator.inputs)
    ctx.save_for_backward(*inputs[:count])
    ctx.attributes = inputs[count:]


def _differentiate(form: Callable[..., Tensor], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Recompute the output with PyTorch and return the gradient of each input; attributes have none."""
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]
        out = form(*tensors, *ctx.attributes)
    gradients = iter(torch.autograd.grad(out, [tensor for tensor in tensors if tensor.requires_grad], gradient))
    return (*(next(gradients) if tensor.requires_grad else None for tensor in tensors), *[None] * len(ctx.attributes))
