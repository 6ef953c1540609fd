"""Launch the operators' kernels on PyTorch's CUDA tensors and on its current stream, with cuda-python."""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plugins import nvrtc
from plugins.kernel import Attributes, Kernel, Launch, Types
from plugins.operators import KERNELS
from qdbev.cuda_check import check
from qdbev.ops.contract import Operator


class LaunchError(ValueError):
    """No kernel can compute these tensors, or a CUDA call failed."""


_check = functools.partial(check, error=LaunchError)


def compute(operator: Operator, inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
    """Compute an operator of plugins.operators.KERNELS with its kernel on the current stream.

    Args:
        inputs: All its inputs, on one GPU, with the shapes of the contract and in its order. The first, and `value_scale`, have number
            types for which there is a kernel. The others may have any type and are converted to float32.

    Returns:
        The output, with the shape of the contract and the number type of `value_scale` if there is one, else of the first input.

    Raises:
        LaunchError: The number or a type of the inputs is wrong, they are not all on one GPU, or a CUDA call failed.
        KernelError: The shapes contradict each other, or there is no kernel for these sizes.
        CompileError: The kernel cannot be compiled for this GPU.
    """
    if len(inputs) != len(operator.inputs):
        raise LaunchError(f"{operator.name} has the inputs {', '.join(operator.inputs)}, but {len(inputs)} tensors were passed")
    tensors = dict(zip(operator.inputs, inputs, strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kernel = KERNELS[operator].make(_types(operator, tensors), shapes, attributes)
    launch = kernel.launch(shapes)
    require_one_gpu(tensors)
    out = torch.empty(operator.output_shape(shapes), dtype=getattr(torch, kernel.out), device=inputs[0].device)
    if out.numel():
        run(
            kernel,
            launch,
            [_readable(tensor if name in operator.value_inputs else tensor.float()) for name, tensor in tensors.items()],
            out,
        )
    return out


def _types(operator: Operator, tensors: Mapping[str, Tensor]) -> Types:
    """Return the number types of the first input and of the output. Raises LaunchError if there is no kernel for them."""
    names = operator.value_inputs
    value, out = (str(tensors[name].dtype).removeprefix("torch.") for name in (names[0], names[-1]))
    known = KERNELS[operator].types
    if (value, out) not in known:
        listed = ", ".join(f"{a} to {b}" for a, b in known)
        found = " and ".join(f"{name} is {tensors[name].dtype}" for name in names)
        raise LaunchError(f"{found}; the kernels of {operator.name} compute {listed}")
    return value, out


def require_one_gpu(tensors: Mapping[str, Tensor]) -> None:
    """Raise LaunchError unless all tensors are on the same GPU."""
    first = next(iter(tensors))
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor.device != device or device.type != "cuda":
            raise LaunchError(f"{name} is on {tensor.device} and {first} on {device}; a kernel needs all its inputs on one GPU")


def _readable(tensor: Tensor) -> Tensor:
    """Return the tensor as a contiguous one that starts at a multiple of 16 bytes, copied only if necessary."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def run(kernel: Kernel, launch: Launch, inputs: Sequence[Tensor], out: Tensor) -> None:
    """Launch a kernel on PyTorch's current stream. It is compiled and loaded when first used on a device.

    `inputs` and `out` are as the kernel expects them, on one GPU. Raises LaunchError or CompileError as `compute` does.
    """
    from cuda.bindings import driver

    with torch.cuda.device(out.device):
        number = torch.cuda.current_device()
        if int(_check(driver.cuCtxGetCurrent())) == 0:  # PyTorch has not used the GPU in this thread yet
            _check(driver.cuCtxSetCurrent(_check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(number))))))
        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        function, given = _function(number, kernel), arguments(launch, inputs, out)
        _check(driver.cuLaunchKernel(function, *launch.grid, kernel.threads, 1, 1, 0, stream, given, 0))


def arguments(launch: Launch, inputs: Sequence[Tensor], out: Tensor) -> tuple[tuple[int, ...], tuple[type, ...]]:
    """Return the values and the ctypes types of the kernel's parameters, in the order that plugins.kernel.Kernel defines."""
    values = (*(tensor.data_ptr() for tensor in inputs), *launch.numbers.values(), out.data_ptr())
    return values, (*[ctypes.c_void_p] * len(inputs), *[ctypes.c_int] * len(launch.numbers), ctypes.c_void_p)


@functools.cache
def _function(device: int, kernel: Kernel) -> Any:
    """Return the kernel function, compiled for device number `device` and loaded there. This device must be the current one."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    module = _check(driver.cuModuleLoadData(nvrtc.cubin(kernel.source(), f"sm_{major}{minor}")))
    function = _check(driver.cuModuleGetFunction(module, kernel.entry.encode()))
    carveout = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    _check(driver.cuFuncSetAttribute(function, carveout, 0))  # all on-chip memory serves as L1 cache: no kernel here uses shared memory
    return function
