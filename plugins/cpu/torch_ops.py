"""The CPU kernels on PyTorch's tensors, with gradients.

`plugins.torch_ops.install_on_cpu()` makes the functions of qdbev/ops call them. All tensors are float32; letters as in qdbev/ops/sca.py.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from plugins.cpu.build import compiled
from qdbev.ops.contract import MSDA, SCA, Operator

_SIZES = tuple("BNSMCQDLP")
_TENSORS = (
    "level_hw", "value", "value_scale", "reference_points", "visible", "sampling_offsets", "attention_logits",
)  # fmt: skip


class _Attention(ctypes.Structure):
    """`qdbev::Attention` of kernels.h."""

    _fields_ = [*((name, ctypes.c_int64) for name in _SIZES), *((name, ctypes.c_void_p) for name in _TENSORS)]


class _AttentionGradients(ctypes.Structure):
    """`qdbev::AttentionGradients` of kernels.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("output", "value", "reference_points", "sampling_offsets", "attention_logits")]


class _Im2col(ctypes.Structure):
    """`qdbev::Im2col` of kernels.h."""

    _fields_ = [*((name, ctypes.c_int64) for name in "BCHWhw"), ("stride", ctypes.c_int64)] + [
        (name, ctypes.c_void_p) for name in ("x", "offsets", "mask")
    ]


@functools.cache
def _loaded() -> ctypes.CDLL:
    """Load the library, compiled if necessary. Raises CompilerError if that is not possible."""
    loaded = ctypes.CDLL(str(compiled("torch")))
    loaded.qdbev_instruction_set.restype = ctypes.c_char_p
    return loaded


def instruction_set() -> str:
    """Return the instruction set whose kernels run on this CPU: plain, avx2 or avx512."""
    return _loaded().qdbev_instruction_set().decode()


def attend(operator: Operator, inputs: Sequence[Tensor], level_hw: Sequence[int]) -> Tensor:
    """Compute an attention: the operator's inputs in the order of the contract, h0, w0, h1, w1, ...; returns (B, Q, M * C)."""
    problem, kept = _problem(operator, inputs, level_hw)
    out = torch.empty(problem.B, problem.Q, problem.M * problem.C)
    _loaded().qdbev_attend(ctypes.byref(problem), ctypes.c_void_p(out.data_ptr()))
    del kept
    return out


@library.custom_op("qdbev::attention_backward", mutates_args=(), device_types="cpu")
def attend_backward(inputs: Sequence[Tensor], level_hw: Sequence[int], gradient: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """Compute the gradient of each input of an attention from that of the output (B, Q, M * C).

    `inputs` are those of SpatialCrossAttention or MultiScaleDeformableAttention, in the order of the contract. A gradient that is not
    wanted is returned as a tensor without elements.
    """
    operator = MSDA if len(inputs) == len(MSDA.inputs) else SCA
    problem, kept = _problem(operator, inputs, level_hw)
    asked = [name for name, want in zip(operator.inputs, wanted, strict=True) if want]
    named = dict(zip(operator.inputs, kept, strict=False))
    out = {name: torch.zeros_like(named[name]) for name in asked}
    of_heads = torch.empty(problem.B, problem.N, problem.Q, problem.M, problem.D, 2)
    pointers = {name: tensor.data_ptr() for name, tensor in out.items()}
    if "reference_points" in asked:
        pointers["reference_points"] = of_heads.data_ptr()
    gradient = gradient.contiguous()
    _loaded().qdbev_attend_backward(ctypes.byref(problem), ctypes.byref(_AttentionGradients(output=gradient.data_ptr(), **pointers)))
    if "reference_points" in asked:
        out["reference_points"] = of_heads.sum(3).view(named["reference_points"].shape)
    return [out[name] if name in out else gradient.new_empty(0) for name in operator.inputs]


@attend_backward.register_fake
def _(inputs: Sequence[Tensor], level_hw: Sequence[int], gradient: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(x) if want else x.new_empty(0) for x, want in zip(inputs, wanted, strict=True)]


def im2col(x: Tensor, offsets: Tensor, mask: Tensor, stride: int) -> Tensor:
    """Compute `qdbev.ops.deform_conv.modulated_deformable_im2col`."""
    x, offsets, mask = x.contiguous(), offsets.contiguous(), mask.contiguous()
    (B, C, H, W), (h, w) = x.shape, offsets.shape[-2:]
    out = torch.empty(B, C * 9, h, w)
    pointers = {"x": x.data_ptr(), "offsets": offsets.data_ptr(), "mask": mask.data_ptr()}
    problem = _Im2col(B=B, C=C, H=H, W=W, h=h, w=w, stride=stride, **pointers)
    _loaded().qdbev_im2col(ctypes.byref(problem), ctypes.c_void_p(out.data_ptr()))
    return out


def _problem(operator: Operator, inputs: Sequence[Tensor], level_hw: Sequence[int]) -> tuple[_Attention, list[Any]]:
    """Return the structure that the kernels take, and what it points to, which must live as long as it is used."""
    tensors = [tensor.contiguous() for tensor in inputs]
    named = dict(zip(operator.inputs, tensors, strict=True))
    value, references, logits = named["value"], named["reference_points"], named["attention_logits"]
    one_camera = operator.name.startswith(MSDA.name)
    (B, Q, M, L, P), (S, _, C) = logits.shape, value.shape[-3:]
    N, D = (1, 1) if one_camera else (value.shape[1], references.shape[3])
    flat = (ctypes.c_int64 * len(level_hw))(*level_hw)
    problem = _Attention(B=B, N=N, S=S, M=M, C=C, Q=Q, D=D, L=L, P=P, level_hw=ctypes.cast(flat, ctypes.c_void_p))
    for name, tensor in named.items():
        setattr(problem, name, tensor.data_ptr())
    return problem, [*tensors, flat]
