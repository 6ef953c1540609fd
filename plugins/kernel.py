"""The interface between an operator's CUDA kernels and the generic modules that compile, register and launch them.

A folder such as plugins/attention implements `Kernel` for one operator family. The modules launch, tensorrt_ops and torch_ops use only
this interface and the operator's contract in qdbev/ops/contract.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qdbev.ops.contract import Operator

ValueType = Literal["float32", "float16", "int8"]
"""Number type of an operator's first input, named as in PyTorch."""
OutType = Literal["float32", "float16"]
"""Number type of an operator's output, named as in PyTorch."""
Types = tuple[ValueType, OutType]
"""Number types of the first input and of the output. They determine the types of all other inputs; see `input_types`."""
Shapes = Mapping[str, Sequence[int]]
"""Shape of each input by name."""
Attributes = Mapping[str, Sequence[int]]
"""Value of each attribute by name. An attribute that is one integer is a sequence of length one."""


class KernelError(ValueError):
    """There is no kernel for these types and sizes, or the sizes of the inputs contradict each other."""


@dataclass(frozen=True)
class Launch:
    """How to launch a kernel on inputs of given shapes."""

    grid: tuple[int, int, int]
    """Number of blocks along x, y and z."""
    numbers: dict[str, int]
    """The kernel's int32 arguments by name, in the order of its parameters."""


class Kernel(Protocol):
    """One CUDA kernel, whose number types and attributes, and usually some sizes, are compile-time constants.

    Its parameters are, in this order, which is TensorRT's, a pointer to each input of the operator as the contract lists them, the int32
    numbers of `Launch`, and a pointer to the output. All tensors are contiguous and start at a multiple of 16 bytes. Blocks are
    one-dimensional, without dynamic shared memory. A kernel is hashable and compares by value, because compiled kernels are cached.
    """

    @property
    def entry(self) -> str:
        """Name of the kernel function, which the source declares as `extern "C"`."""

    @property
    def threads(self) -> int:
        """Threads per block, along x."""

    @property
    def out(self) -> OutType:
        """Number type of the output."""

    def source(self) -> str:
        """Return the CUDA C++ source."""

    def launch(self, shapes: Shapes) -> Launch:
        """Return the grid and the int32 arguments for inputs of these shapes. Raises KernelError if they do not fit or are too large."""


@dataclass(frozen=True)
class KernelFamily:
    """All kernels of one operator."""

    types: tuple[Types, ...]
    """Combinations of number types for which there are kernels."""
    make: Callable[[Types, Shapes, Attributes], Kernel]
    """Return the kernel for these types, input shapes and attributes; raise KernelError if there is none."""


def input_types(operator: Operator, types: Types) -> dict[str, ValueType]:
    """Return the number type of each input by name.

    The first input and `value_scale` follow `types`; all other inputs are coordinates or logits and always float32.
    """
    value, out = types
    return {**dict.fromkeys(operator.inputs, "float32"), **dict(zip(operator.value_inputs, (value, out), strict=False))}
