"""The kernels on torch's tensors and streams, launched with cuda-python. Letters as in qdbev/ops/sca.py."""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plugins import nvrtc as kernels
from plugins.variant import THREADS, Number, Out, Variant, input_names, of_shapes

_NUMBERS: dict[torch.dtype, Number] = {torch.float32: "float32", torch.float16: "float16", torch.int8: "int8"}
_OUTS: dict[torch.dtype, Out] = {torch.float32: "float32", torch.float16: "float16"}
_OPERATORS = {3: "multi_scale_deformable_attention", 4: "spatial_cross_attention"}


class LaunchError(ValueError):
    """Tensors that a kernel cannot compute, or a CUDA call that failed."""


def attention(value: Tensor, others: Sequence[Tensor], level_hw: Sequence[tuple[int, int]], value_scale: Tensor | None = None) -> Tensor:
    """What the operator gives, computed by a kernel on the current stream.

    Args:
        value: float32, float16 or int8, on a GPU; shape as in the operator.
        others: The operator's other inputs in its order; with `visible` it is spatial cross-attention.
        level_hw: Height and width of each level.
        value_scale: One number, float32 or float16: what a step of an int8 `value` is worth.

    Returns:
        (B, Q, M * C), of the type of `value_scale` for an int8 `value`, else of that of `value`.

    Raises:
        LaunchError: A tensor is missing, of a type that no kernel reads, or not on the GPU of the others, or CUDA refuses.
        VariantError: The shapes do not fit together, or there is no kernel of these sizes.
        CompileError: The kernel cannot be compiled for this GPU.
    """
    tensors = inputs(value, others, value_scale)
    variant = variant_of(tensors, level_hw)
    numbers = variant.launch_numbers({name: tensor.shape for name, tensor in tensors.items()})
    require_one_gpu(tensors)
    B, Q = others[-1].shape[:2]
    out = torch.empty(B, Q, variant.num_heads * variant.channels, dtype=getattr(torch, variant.out), device=value.device)
    if out.numel():
        read = {name: _readable(tensor if name in ("value", "value_scale") else tensor.float()) for name, tensor in tensors.items()}
        run(value.device, _source(variant), variant.op, variant.grid(Q, B), THREADS, *arguments(variant, numbers, {**read, "out": out}))
    return out


def inputs(value: Tensor, others: Sequence[Tensor], value_scale: Tensor | None) -> dict[str, Tensor]:
    """The kernel's inputs by name.

    Raises:
        LaunchError: `value` or its scale is of another type, or there are not as many inputs as an operator has.
    """
    if value.dtype not in _NUMBERS:
        raise LaunchError(f"value is {value.dtype}; kernels exist for float32, float16 and int8")
    if len(others) not in _OPERATORS or others[-1].ndim != 5:
        raise LaunchError(f"{len(others)} inputs behind value, the last of {others[-1].ndim} axes; an operator has 3 or 4, logits last")
    scale = [value_scale] * (value.dtype == torch.int8)
    if any(tensor is None or tensor.dtype not in _OUTS for tensor in scale):
        found = "missing" if value_scale is None else f"{value_scale.dtype}"
        raise LaunchError(f"value is int8; its value_scale is {found}, must be float32 or float16")
    return dict(zip(input_names(_OPERATORS[len(others)], _NUMBERS[value.dtype]), (value, *scale, *others), strict=True))


def variant_of(tensors: Mapping[str, Tensor], level_hw: Sequence[tuple[int, int]]) -> Variant:
    """The kernel for these inputs.

    Raises:
        VariantError: There is none of these sizes.
    """
    out = _OUTS[tensors.get("value_scale", tensors["value"]).dtype]
    return of_shapes(_NUMBERS[tensors["value"].dtype], out, {name: tensor.shape for name, tensor in tensors.items()}, level_hw)


def require_one_gpu(tensors: dict[str, Tensor]) -> None:
    """Raise LaunchError unless all lie on the same GPU."""
    device = tensors["value"].device
    for name, tensor in tensors.items():
        if tensor.device != device or device.type != "cuda":
            raise LaunchError(f"{name} is on {tensor.device}, value on {device}; kernels read one GPU")


def arguments(variant: Variant, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[type, ...]]:
    """Values and types of the kernel's parameters, in their order."""
    values = tuple(numbers[name] if name in variant.numbers else tensors[name].data_ptr() for name in variant.parameters)
    return values, tuple(ctypes.c_int if name in variant.numbers else ctypes.c_void_p for name in variant.parameters)


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
