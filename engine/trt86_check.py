"""Checks that TensorRT 8.6 can read an ONNX, before its parser opens the file.

Never run on TensorRT 8.6: written from the source of its parser, onnx/onnx-tensorrt at release/8.6-GA.

The parser reads operator sets up to 17 and does not refuse newer ones, but misreads some of their nodes without an error: the axes of a
ReduceMean of set 18 are an input, which it ignores, so it reduces all axes. It has no local functions. Without strong typing, precision is
the builder's choice: if it may use float16, it may also compute the geometry in float16.
"""

import onnx

from engine.backend import EngineError
from qdbev.deployed_graph import STANDARD_DOMAINS, Plugins, node_name

NEWEST_OPSET = 17
"""The newest operator set that TensorRT 8.6 reads."""
_INSTEAD = "or build with TensorRT 10 or newer"


def check(model: onnx.ModelProto, plugins: Plugins) -> None:
    """Raise EngineError, with the remedy, for a graph that TensorRT 8.6 would refuse, misread or compute in another precision."""
    opset = max(entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS)
    if opset > NEWEST_OPSET:
        raise EngineError(
            f"the ONNX is of operator set {opset}; TensorRT 8.6 reads up to {NEWEST_OPSET} and would misread newer nodes without an error. "
            f"Export it with --builtin-plugin, {_INSTEAD}"
        )
    names = {name for name, _, _ in plugins}
    for node in model.graph.node:
        if node.domain not in STANDARD_DOMAINS and node.op_type not in names:
            raise EngineError(
                f"node {node_name(node)} is a {node.domain}::{node.op_type}; TensorRT 8.6 reads no local functions and "
                f"has no plugin of that name. Export it with --builtin-plugin, {_INSTEAD}"
            )
    half = _float16(model)
    if half:
        raise EngineError(
            f"{half} is float16; TensorRT 8.6 has no strong typing and would compute the geometry in float16 too. Export it with "
            f"--builtin-plugin instead of --float16, {_INSTEAD}"
        )


def _float16(model: onnx.ModelProto) -> str:
    """The first weight or node of type float16, or an empty string."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            return f"weight {tensor.name}"
    for node in model.graph.node:
        for attribute in node.attribute:
            cast = node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT16
            if cast or attribute.t.data_type == onnx.TensorProto.FLOAT16:
                return f"the output of node {node_name(node)}"
    return ""
