"""Lets a test that draws an ONNX file apply a pass of the export to it."""

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir


def apply(model: onnx.ModelProto, change: Callable[..., Any], *args: Any) -> Any:
    """Apply a pass to `model` in place, and return what the pass returns."""
    graph = ir.from_proto(model)
    result = change(graph, *args)
    model.CopyFrom(ir.to_proto(graph))
    return result
