"""The operators of qdbev/ops on CUDA tensors: computed by kernels, with a gradient.

`install()` registers both with PyTorch. From then on `torch.ops.qdbev`, and the functions of qdbev/ops where no gradient is asked
for, run the kernels; training through those functions stays with the PyTorch operators. Without `install()` these compute CUDA tensors,
too. Nothing falls back: where no kernel exists for the sizes or the GPU, that is an error.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from plugins.launch import attention
from qdbev.ops.msda import multi_scale_deformable_attention
from qdbev.ops.sca import spatial_cross_attention
from qdbev.ops.sca_dense import dense_spatial_cross_attention

_STATIC_FORMS = {
    multi_scale_deformable_attention: multi_scale_deformable_attention,
    spatial_cross_attention: dense_spatial_cross_attention,
}
"""Of each operator, the PyTorch form whose shapes depend on no values: what gradients go through, so that they can be traced."""


@functools.cache
def install() -> None:
    """Register kernels and gradients; a second time does nothing."""
    for operator, form in _STATIC_FORMS.items():
        name = f"qdbev::{operator.__name__}"
        library.register_kernel(name, "cuda", _evaluate)
        library.register_autograd(name, functools.partial(_differentiate, form), setup_context=_keep_inputs)


def _evaluate(value: Tensor, *rest: Any) -> Tensor:
    """The operator's inputs; level_hw comes last, as h0, w0, h1, w1, ..."""
    *others, flat = rest
    return attention(value, others, _pairs(flat))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.level_hw = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(form: Callable[..., Tensor], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Compute again with PyTorch what the kernel gave, and go back through that."""
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]
        out = form(*tensors, _pairs(ctx.level_hw))
    found = iter(torch.autograd.grad(out, [tensor for tensor in tensors if tensor.requires_grad], gradient))
    return (*(next(found) if tensor.requires_grad else None for tensor in tensors), None)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))
