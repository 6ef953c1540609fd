"""The attentions as TensorRT plugins whose kernels TensorRT keeps in the plan: an engine needs neither a plugin library nor Python.

Source: the Python module tensorrt.plugin, read in the bindings of 11.4.0.106: `_validate.py` on signatures, `_plugin_class.py` on what it
passes. Kernels made ahead of time exist from TensorRT 10.9 on (its release notes). Its ONNX parser gives an attribute of integers as int32
(onnx/onnx-tensorrt at 96e7811, `loadFields`) and asks for no preference between forms of a plugin where it has only one.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from plugins import nvrtc as kernels
from plugins.variant import THREADS, Number, VariantError, input_names, of_shapes
from qdbev import schema

PLUGINS: dict[str, tuple[str, ...]] = {
    "MultiScaleDeformableAttention": input_names("multi_scale_deformable_attention", "float32"),
    "MultiScaleDeformableAttentionInt8": input_names("multi_scale_deformable_attention", "int8"),
    "SpatialCrossAttention": input_names("spatial_cross_attention", "float32"),
    "SpatialCrossAttentionInt8": input_names("spatial_cross_attention", "int8"),
}
"""Inputs of each, in order. All have the attribute level_hw, h0, w0, h1, w1, ..."""
_TYPES = {"value": "FP32|FP16", "value_scale": "FP32|FP16"}
"""Of inputs, as TensorRT writes them: all that stand behind | change together, with the output; what is not named is FP32."""


def register(architecture: str) -> list[str]:
    """Register all with TensorRT; a second time does nothing.

    Args:
        architecture: Of the GPU that engines will be built on and for, as sm_90.

    Returns:
        A list that grows by one line for each plugin that fails while TensorRT builds: TensorRT prints the reason on standard error and
        tells the caller only that there is no engine.

    Raises:
        ImportError: There is no TensorRT with Python plugins.
    """
    import tensorrt.plugin  # not imported by tensorrt itself

    return _register(tensorrt, architecture)


@functools.cache
def _register(trt: ModuleType, architecture: str) -> list[str]:
    trtp, failures = trt.plugin, []
    levels, outputs = {"level_hw": npt.NDArray[np.int32]}, {"outputs": tuple[trtp.TensorDesc]}
    offered, embedded = list[trtp.AutoTuneCombination], tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    for name, inputs in PLUGINS.items():
        plugin, tensors = f"{schema.OP_DOMAIN}::{name}", dict.fromkeys(inputs, trtp.TensorDesc)
        describe, combine = functools.partial(_describe, trt, inputs), functools.partial(_combinations, trt, inputs)
        kernel = _reporting(name, functools.partial(_kernel, trt, architecture, inputs), failures)
        trtp.register(plugin)(_signed(describe, {**tensors, **levels}, trtp.TensorDesc))
        trtp.autotune(plugin)(_signed(combine, {**tensors, **outputs}, offered))
        trtp.aot_impl(plugin)(_signed(kernel, {**tensors, **levels, **outputs, "tactic": int}, embedded))
    return failures


def _signed(function: Callable[..., Any], parameters: dict[str, Any], returns: Any) -> Callable[..., Any]:
    """`function` with a signature, which is where TensorRT finds names and types of inputs and attributes."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returns)
    return function


def _reporting(name: str, function: Callable[..., Any], failures: list[str]) -> Callable[..., Any]:
    """`function`, which adds to `failures` why it ends early."""

    def reporting(*given: Any) -> Any:
        try:
            return function(*given)
        except Exception as error:
            failures.append(f"{name}: {error}")
            raise

    return reporting


def _describe(trt: ModuleType, inputs: Sequence[str], *given: Any, level_hw: npt.NDArray[np.int32]) -> Any:
    """Shape (B, Q, M * C) and type of the output: that of `value_scale`, or of `value` where that has none."""
    tensors = dict(zip(inputs, given, strict=True))
    batch, num_query = (tensors["attention_logits"].shape_expr[axis] for axis in (0, 1))
    heads, channels = (tensors["value"].shape_expr[axis] for axis in (-2, -1))
    dtype = tensors.get("value_scale", tensors["value"]).dtype
    return trt.plugin.from_shape_expr((batch, num_query, heads * channels), dtype)


def _combinations(trt: ModuleType, inputs: Sequence[str], *_: Any) -> list[Any]:
    """The types that kernels exist for; all tensors are contiguous."""
    types = {**_TYPES, "value": "INT8"} if "value_scale" in inputs else _TYPES
    return [trt.plugin.AutoTuneCombination(", ".join([*(types.get(name, "FP32") for name in inputs), "FP32|FP16"]), "LINEAR")]


def _kernel(trt: ModuleType, architecture: str, inputs: Sequence[str], *given: Any) -> tuple[str, bytes, Any, Any]:
    """Name, machine code, launch and int32 arguments of the kernel for these tensors.

    Raises:
        VariantError: There is none of these sizes, or a size is not fixed.
        CompileError: It cannot be compiled.
    """
    numbers: dict[Any, Number] = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.INT8: "int8"}
    *tensors, level_hw, (out,), _ = given
    shapes = {name: tuple(tensor.shape) for name, tensor in zip(inputs, tensors, strict=True)}
    for name, shape in shapes.items():
        if min(shape, default=0) < 0:
            raise VariantError(f"{name} is {shape}: -1 is a size left open until the engine runs; export the ONNX with fixed sizes")
    levels = list(zip(level_hw[::2], level_hw[1::2], strict=True))
    variant = of_shapes(numbers[tensors[0].dtype], numbers[out.dtype], shapes, levels)
    passed = variant.launch_numbers(shapes)
    launch = trt.plugin.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.grid_z = variant.grid(passed["num_query"], passed["batch"])
    launch.block_x = THREADS
    arguments = trt.plugin.SymIntExprs.from_tuple([trt.plugin.SymInt32(passed[name]) for name in variant.numbers])
    return variant.op, kernels.cubin(variant.source(), architecture), launch, arguments
