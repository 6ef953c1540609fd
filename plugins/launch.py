"""The kernels on torch's tensors and streams, launched with cuda-python. Letters as in qdbev/ops/sca.py."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plugins import compile as kernels
from plugins.variant import MAX_CAMERAS, THREADS, Variant, row_length

_NUMBERS = {torch.float32: "float32", torch.float16: "float16", torch.int8: "int8"}
_OPERATORS = {3: "multi_scale_deformable_attention", 4: "spatial_cross_attention"}
_MAX_BATCH = 65535
"""Blocks along z."""


class LaunchError(ValueError):
    """Tensors that a kernel cannot compute, or a CUDA call that failed."""


def attention(value: Tensor, others: Sequence[Tensor], level_hw: Sequence[tuple[int, int]], value_scale: Tensor | None = None) -> Tensor:
    """What the operator gives, computed by a kernel on the current stream.

    Args:
        value: float32, float16 or int8, on a GPU; shape as in the operator.
        others: The operator's other inputs in its order; with `visible` it is spatial cross-attention.
        level_hw: Height and width of each level.
        value_scale: (1,) float32, what a step of an int8 `value` is worth.

    Returns:
        (B, Q, M * C), float32 for a float32 `value`, else float16.

    Raises:
        LaunchError: The tensors do not fit together or are not all on one GPU, or CUDA refuses.
        VariantError: There is no kernel of these sizes.
        CompileError: The kernel cannot be compiled for this GPU.
    """
    variant = variant_of(value, others, level_hw)
    tensors = check(variant, value, others, value_scale)
    B, Q = others[-1].shape[:2]
    out = torch.empty(B, Q, variant.num_heads * variant.channels, dtype=getattr(torch, variant.out), device=value.device)
    if out.numel():
        run(value.device, _source(variant), variant.op, variant.grid(Q, B), THREADS, *arguments(variant, tensors, out))
    return out


def variant_of(value: Tensor, others: Sequence[Tensor], level_hw: Sequence[tuple[int, int]]) -> Variant:
    """The kernel for these tensors.

    Raises:
        LaunchError: `value` is of another type, or not an operator's number of inputs.
        VariantError: There is no kernel of these sizes.
    """
    if value.dtype not in _NUMBERS:
        raise LaunchError(f"value is {value.dtype}; kernels exist for float32, float16 and int8")
    if len(others) not in _OPERATORS or others[-1].ndim != 5:
        raise LaunchError(f"{len(others)} inputs behind value, the last of {others[-1].ndim} axes; an operator has 3 or 4, logits last")
    return Variant(
        op=_OPERATORS[len(others)],
        value=_NUMBERS[value.dtype],
        out="float32" if value.dtype == torch.float32 else "float16",
        num_heads=value.shape[-2],
        channels=value.shape[-1],
        num_points=others[-1].shape[-1],
        num_pillar_points=others[0].shape[-2] if len(others) == 4 else 1,
        level_hw=tuple((int(h), int(w)) for h, w in level_hw),
    )


def check(variant: Variant, value: Tensor, others: Sequence[Tensor], value_scale: Tensor | None) -> dict[str, Tensor]:
    """The kernel's input tensors by name, contiguous and float32 behind `value`.

    Raises:
        LaunchError: A shape or device is not what the kernel would read.
    """
    given = [value, *[value_scale] * (variant.value == "int8"), *others]
    if any(tensor is None for tensor in given):
        raise LaunchError("value is int8; its value_scale is missing")
    tensors = dict(zip(variant.parameters, given, strict=False))
    B, Q = others[-1].shape[:2]
    M, C, L, P, D = variant.num_heads, variant.channels, len(variant.level_hw), variant.num_points, variant.num_pillar_points
    cameras = (value.shape[1],) if "visible" in tensors else ()
    expected = {
        "value": (B, *cameras, variant.num_keys, M, C),
        "value_scale": (1,),
        "reference_points": (B, *cameras, Q, *((D, 2) if cameras else (2,))),
        "visible": (B, *cameras, Q),
        "sampling_offsets": (B, Q, M, L, P, 2),
        "attention_logits": (B, Q, M, L, P),
    }
    if B > _MAX_BATCH or (cameras and cameras[0] > MAX_CAMERAS):
        raise LaunchError(f"batch {B}, {cameras[0] if cameras else 1} cameras; kernels take up to {_MAX_BATCH} and {MAX_CAMERAS}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise LaunchError(f"{name} is {tuple(tensor.shape)}, must be {expected[name]}")
    require_one_gpu(tensors)
    return {name: _readable(tensor if name == "value" else tensor.float()) for name, tensor in tensors.items()}


def require_one_gpu(tensors: dict[str, Tensor]) -> None:
    """Raise LaunchError unless all lie on the same GPU."""
    device = tensors["value"].device
    for name, tensor in tensors.items():
        if tensor.device != device or device.type != "cuda":
            raise LaunchError(f"{name} is on {tensor.device}, value on {device}; kernels read one GPU")


def arguments(variant: Variant, tensors: dict[str, Tensor], out: Tensor) -> tuple[tuple[int, ...], tuple[type, ...]]:
    """Values and types of the kernel's parameters, in their order."""
    num_query = out.shape[1]
    numbers = {"num_query": num_query, "num_cameras": tensors["value"].shape[1], "row_length": row_length(num_query)}
    addresses = {name: tensor.data_ptr() for name, tensor in (*tensors.items(), ("out", out))}
    values = tuple(numbers[name] if name in numbers else addresses[name] for name in variant.parameters)
    return values, tuple(ctypes.c_int if name in numbers else ctypes.c_void_p for name in variant.parameters)


def _readable(tensor: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def run(
    device: torch.device,
    source: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int,
    values: tuple[int, ...],
    types: tuple[type, ...],
) -> None:
    """Launch a kernel of `source` on torch's current stream; compiled and loaded the first time.

    Args:
        device: A GPU.
        source: CUDA C++.
        kernel: Its name in there.
        grid: Blocks along x, y and z.
        threads: A block, along x.
        values: The kernel's arguments, addresses as numbers.
        types: Their ctypes types.

    Raises:
        LaunchError: CUDA refuses.
        CompileError: It cannot be compiled for this GPU.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device):
        number = torch.cuda.current_device()
        if int(_check(driver.cuCtxGetCurrent())) == 0:  # a thread in which torch has not touched the GPU yet
            _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(number))))))
        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        _check(driver.cuLaunchKernel(_function(number, source, kernel), *grid, threads, 1, 1, 0, stream, (values, types), 0))


@functools.cache
def _source(variant: Variant) -> str:
    return variant.source()


@functools.cache
def _function(device: int, source: str, kernel: str) -> Any:
    """The kernel, compiled for device number `device`, which is the current one, and loaded there."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    module = _check(driver.cuModuleLoadData(kernels.cubin(source, f"sm_{major}{minor}")))
    function = _check(driver.cuModuleGetFunction(module, kernel.encode()))
    carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    _check(driver.cuFuncSetAttribute(function, carveout, 0))  # all of it as L1 cache: no kernel here shares memory
    return function


def _check(result: tuple[Any, ...]) -> Any:
    """Value of a cuda-python call, which returns (status, values...)."""
    status, *values = result
    if int(status) != 0:
        raise LaunchError(f"CUDA answers {status.name}")
    return values[0] if values else None
