"""Register the kernels as TensorRT plugins. TensorRT stores their machine code in the plan, so that an engine needs no plugin library.

Source: the Python module tensorrt.plugin, as read in the bindings of 11.4.0.106: `_validate.py` for signatures, `_plugin_class.py` for
what it passes to each function. TensorRT accepts such ahead-of-time compiled kernels since 10.9 (its release notes). Its ONNX parser
passes an attribute that is a list of integers as int32 (onnx/onnx-tensorrt at 96e7811, `loadFields`).
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from plugins import nvrtc
from plugins.kernel import KernelError, KernelFamily, ValueType, input_types
from plugins.operators import KERNELS
from qdbev.ops.contract import DOMAIN, Operator

_TENSORRT_TYPES: dict[ValueType, str] = {"float32": "FP32", "float16": "FP16", "int8": "INT8"}
"""TensorRT's name of each number type in an AutoTuneCombination."""


def register(architecture: str) -> list[str]:
    """Register all kernels as TensorRT plugins for a GPU architecture such as sm_90; calling it again does nothing.

    Returns a list to which each plugin that fails during a build adds a line, because TensorRT only prints the reason. Raises ImportError
    if there is no TensorRT with Python plugins.
    """
    import tensorrt.plugin  # `import tensorrt` does not import it

    return _register(tensorrt, architecture)


@functools.cache
def _register(trt: ModuleType, architecture: str) -> list[str]:
    failures: list[str] = []
    for operator, family in KERNELS.items():
        register_operator(trt, architecture, operator, family, failures)
    return failures


def register_operator(trt: ModuleType, architecture: str, operator: Operator, family: KernelFamily, failures: list[str]) -> None:
    """Register one operator. `failures` receives a line for each error during a build."""
    trtp, plugin = trt.plugin, f"{DOMAIN}::{operator.name}"
    tensors = dict.fromkeys(operator.inputs, trtp.TensorDesc)
    attributes = dict.fromkeys(operator.attributes, npt.NDArray[np.int32])
    outputs = {"outputs": tuple[trtp.TensorDesc]}
    compiled = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    describe = functools.partial(_describe_output, trt, operator)
    combine = functools.partial(_combinations, trt, operator, family)

    def compile_kernel(*given: Any) -> Any:
        try:
            return _compile(trt, architecture, operator, family, *given)
        except Exception as error:
            failures.append(f"{operator.name}: {error}")
            raise

    trtp.register(plugin)(_with_signature(describe, {**tensors, **attributes}, trtp.TensorDesc))
    trtp.autotune(plugin)(_with_signature(combine, {**tensors, **outputs}, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(plugin)(_with_signature(compile_kernel, {**tensors, **attributes, **outputs, "tactic": int}, compiled))


def _with_signature(function: Callable[..., Any], parameters: dict[str, Any], returns: Any) -> Callable[..., Any]:
    """Set the signature of `function`, from which TensorRT reads the names and types of inputs and attributes."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returns)
    return function


def _describe_output(trt: ModuleType, operator: Operator, *inputs: Any, **_: Any) -> Any:
    """Return TensorRT's description of the output: symbolic shape and number type."""
    tensors = dict(zip(operator.inputs, inputs, strict=True))
    shape = operator.output_shape({name: tuple(tensor.shape_expr) for name, tensor in tensors.items()})
    return trt.plugin.from_shape_expr(shape, tensors[operator.value_inputs[-1]].dtype)


def _combinations(trt: ModuleType, operator: Operator, family: KernelFamily, *_: Any) -> list[Any]:
    """Return the types that have a kernel, in TensorRT's syntax: alternatives separated by | are chosen together for all tensors."""
    rows = [[*input_types(operator, types).values(), types[1]] for types in family.types]
    columns = [[_TENSORRT_TYPES[number] for number in column] for column in zip(*rows, strict=True)]
    written = [column[0] if len(set(column)) == 1 else "|".join(column) for column in columns]
    return [trt.plugin.AutoTuneCombination(", ".join(written), "LINEAR")]


def _compile(trt: ModuleType, architecture: str, operator: Operator, family: KernelFamily, *given: Any) -> tuple[str, bytes, Any, Any]:
    """Return the name, the machine code, the launch parameters and the int32 arguments of the kernel for these tensors."""
    numbers: dict[Any, ValueType] = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.INT8: "int8"}
    count = len(operator.inputs)
    tensors, (*values, (out,), _) = given[:count], given[count:]
    shapes = {name: tuple(tensor.shape) for name, tensor in zip(operator.inputs, tensors, strict=True)}
    for name, shape in shapes.items():
        if min(shape, default=0) < 0:
            raise KernelError(f"{name} is {shape}: -1 is a size that is only known when the engine runs; export the ONNX with fixed sizes")
    attributes = dict(zip(operator.attributes, values, strict=True))
    kernel = family.make((numbers[tensors[0].dtype], numbers[out.dtype]), shapes, attributes)
    launch = kernel.launch(shapes)
    parameters = trt.plugin.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = launch.grid
    parameters.block_x = kernel.threads
    arguments = trt.plugin.SymIntExprs.from_tuple([trt.plugin.SymInt32(number) for number in launch.numbers.values()])
    return kernel.entry, nvrtc.cubin(kernel.source(), architecture), parameters, arguments
