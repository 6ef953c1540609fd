"""A graph as TensorRT 8.6 reads it: operator set 17, no local functions, float weights in front of Q/DQ.

What it does not refuse but reads wrongly: `start` and `end` of Shape, which it does not look at; integers of Constant nodes, which it
copies as floats; axes of reductions as an input, which are of operator set 18. Source: onnx/onnx-tensorrt at release/8.6-GA,
builtin_op_importers.cpp. onnx.version_converter (1.23) does not go from 18 to 17: it has no way back for Split.
"""

import numpy as np
import onnx
from onnx import NodeProto, defs, helper, inliner, numpy_helper

from export import constants
from export.graph import Graph, declare_opset, integers, shapes

OPSET = 17
_IR_VERSION = 8
"""That of ONNX 1.13, which TensorRT 8.6 holds."""
_NEW_ATTRIBUTES = {
    "Split": {"num_outputs": None},
    "Resize": {"antialias": 0, "axes": [], "keep_aspect_ratio_policy": b"stretch"},
}
"""What operator set 18 added, with the value that means the same as its absence; None: any value does, as the outputs are counted."""


def convert(model: onnx.ModelProto) -> None:
    """Put `model`, of operator set 18, into that form, in place.

    Raises:
        ValueError: A node has no form in operator set 17.
    """
    model.CopyFrom(inliner.inline_local_functions(model))
    _write_out_shapes(model)
    constants.fold(model, of=("Constant",))
    graph = Graph(model)
    nodes: list[NodeProto] = []
    for node in graph.proto.node:
        if node.op_type == "DequantizeLinear":
            nodes.extend(_dequantized(graph, node))
        elif node.domain == "":
            _lower(graph, node)
        if node.op_type != "DequantizeLinear":
            nodes.append(node)
    del graph.proto.node[:]
    graph.proto.node.extend(nodes)
    graph.prune()
    declare_opset(model, OPSET)
    model.ir_version = _IR_VERSION


def _write_out_shapes(model: onnx.ModelProto) -> None:
    """Make constants of the sizes that Shape nodes ask for."""
    known = shapes(model)
    for node in model.graph.node:
        if node.op_type == "Shape":
            sizes = known[node.input[0]][integers(node, "start", 0) : integers(node, "end", len(known[node.input[0]]))]
            value = numpy_helper.from_array(np.array(sizes, np.int64))
            node.CopyFrom(helper.make_node("Constant", [], list(node.output), name=node.name, value=value))


def _dequantized(graph: Graph, dequantize: NodeProto) -> list[NodeProto]:
    """The node with a zero point, which the parser wants; behind a QuantizeLinear where integers are stored, which it may not read."""
    stored, scale, *zero = dequantize.input
    node = NodeProto()
    node.CopyFrom(dequantize)
    steps = graph.constant(scale)
    if not zero:
        node.input.append(graph.add_constant(f"{scale}.zero", np.zeros(steps.shape, np.int8)))
    values = graph.constant(stored)
    if values is None:
        return [node]
    axis = integers(node, "axis", 1)
    broadcast = steps.reshape([-1 if index == axis else 1 for index in range(values.ndim)]) if steps.ndim else steps
    weight = graph.add_constant(f"{stored.removesuffix('.int8')}.float32", values * broadcast)
    quantize = helper.make_node("QuantizeLinear", [weight, *node.input[1:]], [f"{weight}.quantized"], name=f"{weight}.quantize", axis=axis)
    node.input[0] = quantize.output[0]
    return [quantize, node]


def _lower(graph: Graph, node: NodeProto) -> None:
    """Write a node as operator set 17 has it."""
    if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1:
        axes = graph.constant(node.input[1])
        del node.input[1:]
        _drop(node, {"noop_with_empty_axes": 0})
        node.attribute.append(helper.make_attribute("axes", axes.tolist()))
    elif node.op_type in _NEW_ATTRIBUTES:
        _drop(node, _NEW_ATTRIBUTES[node.op_type])
    elif defs.get_schema(node.op_type, OPSET + 1).since_version > OPSET:
        raise ValueError(f"node {node.name} is a {node.op_type} of operator set 18, which has no form in 17; leave --builtin-plugin out")


def _drop(node: NodeProto, absent: dict[str, object]) -> None:
    for attribute in [found for found in node.attribute if found.name in absent]:
        value, same = helper.get_attribute_value(attribute), absent[attribute.name]
        if same is not None and value != same:
            raise ValueError(f"{attribute.name}={value!r} of node {node.name} has no form in operator set 17; leave --builtin-plugin out")
        node.attribute.remove(attribute)
