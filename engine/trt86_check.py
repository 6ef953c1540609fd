"""What of an ONNX TensorRT 8.6 can read, checked before its parser sees the file.

Source: the parser at onnx/onnx-tensorrt release/8.6-GA. It reads operator sets up to 17 and does not refuse newer ones, but reads some
of their nodes wrongly without a word: the axes of a ReduceMean of set 18 come as an input, which it does not look at, so it reduces
all of them. It has no local functions. Without strong typing, precision is the builder's choice: allowed to use float16 it would also
take it for the geometry.
"""

import onnx

from engine import onnx_products
from engine.backend import EngineError

NEWEST_OPSET = 17
_STANDARD_DOMAINS = ("", "ai.onnx")
_INSTEAD = "or build with TensorRT 10 or newer"


def check(model: onnx.ModelProto, plugins: frozenset[tuple[str, str, str]]) -> None:
    """Raise EngineError, saying what to do, for what TensorRT 8.6 would refuse, misread or compute in another precision.

    `plugins` are the registered ones as (name, version, namespace).
    """
    opset = max(entry.version for entry in model.opset_import if entry.domain in _STANDARD_DOMAINS)
    if opset > NEWEST_OPSET:
        raise EngineError(
            f"the ONNX is of operator set {opset}; TensorRT 8.6 reads up to {NEWEST_OPSET} and would read newer nodes wrongly without a "
            f"word. Export it with --builtin-plugin, {_INSTEAD}"
        )
    names = {name for name, _, _ in plugins}
    for node in model.graph.node:
        if node.domain not in _STANDARD_DOMAINS and node.op_type not in names:
            raise EngineError(
                f"node {onnx_products.node_name(node)} is a {node.domain}::{node.op_type}; TensorRT 8.6 reads no local functions and "
                f"has no plugin of that name. Export it with --builtin-plugin, {_INSTEAD}"
            )
    half = _float16(model)
    if half:
        raise EngineError(
            f"{half} is float16; TensorRT 8.6 has no strong typing and would compute the geometry in float16 too. Export it with "
            f"--builtin-plugin instead of --float16, {_INSTEAD}"
        )


def _float16(model: onnx.ModelProto) -> str:
    """The first weight or node that brings float16 into the onnx_products, or nothing."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            return f"weight {tensor.name}"
    for node in model.graph.node:
        for attribute in node.attribute:
            cast = node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT16
            if cast or attribute.t.data_type == onnx.TensorProto.FLOAT16:
                return f"the output of node {onnx_products.node_name(node)}"
    return ""
