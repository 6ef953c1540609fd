"""Run TensorRT plugins under NVIDIA's own Python code for plugins, without TensorRT and without a GPU.

That code is the module tensorrt.plugin. Full TensorRT is large and useless without a GPU, but the Python bindings of its lean runtime
contain the same module. The lean runtime builds no engines, so this file replaces what only a builder has: the names TensorFormat and
ITensor, the formats in tensor descriptions, and the builder's symbolic sizes, which are numbers here.
"""

import enum
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qdbev.ops.contract import DOMAIN, VERSION, Operator


class TensorFormat(enum.Enum):
    LINEAR = 0


@contextmanager
def lean_tensorrt() -> Iterator[ModuleType]:
    """Put a module in the place of `tensorrt` that can register and run plugins. The test is skipped without the lean runtime."""
    lean = pytest.importorskip("tensorrt_lean_bindings", reason="needs the lean runtime: pip install -r requirements.txt")
    module = ModuleType("tensorrt")
    module.__dict__.update({name: value for name, value in vars(lean).items() if not name.startswith("__")})
    module.TensorFormat, module.ITensor = TensorFormat, type("ITensor", (), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", module)
        module.plugin = importlib.import_module("tensorrt_lean_bindings.plugin")
        patch.setitem(sys.modules, "tensorrt.plugin", module.plugin)
        yield module


class Instance:
    """A plugin that is created as TensorRT's parser creates it and is taken through the steps of a build."""

    def __init__(
        self, trt: ModuleType, operator: Operator, shapes: dict[str, tuple[int, ...]], types: Mapping[str, Any], attributes: dict[str, Any]
    ) -> None:
        self.trt = trt
        self.shapes, self.types = shapes, [types.get(name, trt.DataType.FLOAT) for name in shapes]
        self.attributes = {name: np.array(value, np.int32) for name, value in attributes.items()}  # TensorRT keeps only pointers
        fields = [trt.PluginField(name, value, trt.PluginFieldType.INT32) for name, value in self.attributes.items()]
        creator = trt.get_plugin_registry().get_creator(operator.name, str(VERSION), DOMAIN)
        request = trt.QuickPluginCreationRequest.UNKNOWN
        collection = trt.PluginFieldCollection(fields)
        self.plugin = creator.create_plugin(operator.name, DOMAIN, collection, trt.TensorRTPhase.BUILD, request)

    def output_types(self) -> list[Any]:
        """Return the output types that the plugin declares."""
        return self.plugin.get_output_data_types(self.types, [len(shape) for shape in self.shapes.values()])

    def output_shape(self) -> list[int]:
        """Return the output shape that the plugin declares."""
        self.output_types()
        self.plugin.get_output_shapes([[_size(self.trt, s) for s in shape] for shape in self.shapes.values()], [], _builder(self.trt))
        return [size.constant_value() for size in self.plugin.output_descs[0].shape_expr]

    def launch(self) -> tuple[Any, list[Any], str, bytes]:
        """Return the launch parameters, the int32 arguments, and the name and machine code of the kernel."""
        out = self.output_shape()
        described = zip([*self.shapes.values(), out], [*self.types, *self.output_types()], strict=True)
        given = [_described(self.trt, shape, dtype) for shape, dtype in described]
        self.plugin.set_tactic(0)
        parameters, numbers = SimpleNamespace(), Numbers()
        self.plugin.get_launch_params([], given, len(self.shapes), parameters, numbers, _builder(self.trt))
        return parameters, numbers, *self.plugin.get_kernel([d.desc for d in given[:-1]], [given[-1].desc])


class Numbers(dict[int, Any]):
    """Receives the kernel's int32 arguments by position."""

    nbSymExprs = 0  # noqa: N815


def _size(trt: ModuleType, number: int) -> Any:
    """Return a symbolic size that is a number. TensorRT's own symbolic sizes come from its builder only."""

    class Size(trt.IDimensionExpr):
        def is_constant(self) -> bool:
            return True

        def get_constant_value(self) -> int:
            return number

    return Size.__new__(Size)


def _builder(trt: ModuleType) -> Any:
    class ExprBuilder(trt.IExprBuilder):
        def constant(self, number: int) -> Any:
            return _size(trt, number)

        def operation(self, operation: Any, first: Any, second: Any) -> Any:
            assert operation == trt.DimensionOperation.PROD
            return _size(trt, first.get_constant_value() * second.get_constant_value())

    return ExprBuilder()


def _described(trt: ModuleType, shape: Sequence[int], dtype: Any) -> Any:
    class Described(trt.DynamicPluginTensorDesc):
        desc = SimpleNamespace(dims=trt.Dims(shape), type=dtype, format=trt.TensorFormat.LINEAR, scale=-1.0)

    return Described()


def numbers_of(symbols: Any) -> list[int]:
    """Return the values of symbolic sizes; `constant_value` of SymInt32 fails in 11.4."""
    return [symbol._expr.get_constant_value() for symbol in symbols]
