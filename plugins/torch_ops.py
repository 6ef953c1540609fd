"""Register the kernels with PyTorch, so that the operators of qdbev/ops run on them.

After `install()`, `torch.ops.qdbev.<operator>` runs the kernel on CUDA tensors and has a gradient. The functions of qdbev/ops run the
kernel too if no gradient is needed; with a gradient they run PyTorch code. Without a kernel for the sizes or the GPU, an error is raised.

After `install_on_cpu()`, operators and functions run the kernels of plugins/cpu on float32 tensors of the CPU, also in training: both
attentions have kernels for their gradients, and the gather of deformable convolutions has the gradient of its PyTorch code.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from plugins.cpu import build
from plugins.cpu import torch_ops as on_cpu
from plugins.launch import compute
from plugins.operators import KERNELS
from qdbev.ops import kernels
from qdbev.ops.contract import DOMAIN, IM2COL, MSDA, SCA, Operator
from qdbev.ops.deform_conv import gathered_columns
from qdbev.ops.msda import multi_scale_deformable_attention
from qdbev.ops.sca import dense_spatial_cross_attention


def _with_pairs(form: Callable[..., Tensor], *given: Any) -> Tensor:
    """Call `form`, whose last argument is [(h0, w0), ...], with h0, w0, ... in its place, as the contract says."""
    *tensors, flat = given
    return form(*tensors, list(zip(flat[::2], flat[1::2], strict=True)))


_DIFFERENTIABLE: dict[Operator, Callable[..., Tensor]] = {
    MSDA: functools.partial(_with_pairs, multi_scale_deformable_attention),
    SCA: functools.partial(_with_pairs, dense_spatial_cross_attention),
    IM2COL: gathered_columns,
}
"""PyTorch code with the gradient of each operator, called as the contract says; traceable, as its shapes depend on no values."""


@functools.cache
def install() -> None:
    """Register all kernels and gradients with PyTorch; calling it again does nothing."""
    for operator in KERNELS:
        if not operator.has_integer_value:  # PyTorch has no operators for the int8 forms
            library.register_kernel(f"{DOMAIN}::{operator.torch_name}", "cuda", evaluation(operator))
    _register_gradients()


def install_on_cpu() -> bool:
    """Register the CPU kernels and their gradients. Without a compiler, say so once, register nothing and return False."""
    if build.compiled_if_possible("torch") is None:
        return False
    _register_on_cpu()
    kernels.have_gradients_on("cpu")
    return True


@functools.cache
def _register_on_cpu() -> None:
    for operator in _DIFFERENTIABLE:
        library.register_kernel(f"{DOMAIN}::{operator.torch_name}", "cpu", functools.partial(_compute_on_cpu, operator))
    _register_gradients()


def _compute_on_cpu(operator: Operator, *given: Any) -> Tensor:
    """Compute an operator with its CPU kernel; other number types than float32 are computed by PyTorch code."""
    *tensors, attribute = given
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return _DIFFERENTIABLE[operator](*given).contiguous()
    return on_cpu.im2col(*given) if operator == IM2COL else on_cpu.attend(operator, tensors, attribute)


@functools.cache
def _register_gradients() -> None:
    for operator in _DIFFERENTIABLE:
        save, backward = functools.partial(_save_inputs, operator), functools.partial(_differentiate, operator)
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


def _differentiate(operator: Operator, ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of each input; attributes have none. Without a kernel for it, the output is computed again with PyTorch."""
    if operator != IM2COL and kernels.have_gradients(gradient):
        wanted = list(ctx.needs_input_grad[: len(operator.inputs)])
        if "visible" in operator.inputs and wanted[operator.inputs.index("visible")]:
            raise ValueError("the CPU kernel of spatial cross-attention has no gradient of `visible`, which is a mask")
        found = on_cpu.attend_backward(list(ctx.saved_tensors), ctx.attributes[0], gradient, wanted)
        return (*(tensor if want else None for tensor, want in zip(found, wanted, strict=True)), None)
    form = _DIFFERENTIABLE[operator]
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]
        out = form(*tensors, *ctx.attributes)
    gradients = iter(torch.autograd.grad(out, [tensor for tensor in tensors if tensor.requires_grad], gradient))
    return (*(next(gradients) if tensor.requires_grad else None for tensor in tensors), *[None] * len(ctx.attributes))
