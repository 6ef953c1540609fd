"""Converts a graph to what TensorRT 8.6 reads: operator set 17, no local functions, float weights in front of Q/DQ.

Never run on TensorRT 8.6: written from the source of its parser.

The parser does not refuse, but misreads: `start` and `end` of Shape, which it ignores; integers of Constant nodes, which it copies as
floats; axes of reductions as an input, which are of operator set 18. Source: onnx/onnx-tensorrt at release/8.6-GA,
builtin_op_importers.cpp. onnx.version_converter (1.23) cannot convert from 18 to 17, because it has no adapter for Split.
"""

import numpy as np
import onnx_ir as ir
from onnx import defs
from onnx_ir.passes import common

from export.constants import fold_constant_products
from export.graph import add_constant, constant, declare_opset, infer_shapes, remove_unused

OPSET = 17
_IR_VERSION = 8
"""IR version of ONNX 1.13, with which TensorRT 8.6 is built."""
_NEW_ATTRIBUTES = {
    "Split": {"num_outputs": None},
    "Resize": {"antialias": 0, "axes": (), "keep_aspect_ratio_policy": "stretch"},
}
"""Attributes that operator set 18 added, with the value that means the same as their absence; None: any value, as outputs are counted."""


def convert(model: ir.Model) -> None:
    """Convert `model`, of operator set 18, in place. Raises ValueError if a node has no form in operator set 17."""
    common.InlinePass()(model)
    _replace_shapes(model)
    fold_constant_products(model, ["Constant"])
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear":
            _expand_dequantize(node)
        elif node.domain == "":
            _lower(node)
    remove_unused(model)
    declare_opset(model, OPSET)
    model.ir_version = _IR_VERSION


def _replace_shapes(model: ir.Model) -> None:
    """Replace Shape nodes by Constant nodes."""
    infer_shapes(model)
    for node in [node for node in model.graph if node.op_type == "Shape"]:
        sizes = node.inputs[0].shape.numpy()
        start, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
        value = ir.tensor(np.array(sizes[start:end], np.int64))
        node.op_type = "Constant"
        node.resize_inputs(0)
        node.attributes.clear()
        node.attributes["value"] = ir.AttrTensor("value", value)


def _expand_dequantize(node: ir.Node) -> None:
    """Add the zero point that the parser requires, and replace stored integers by float weights and a QuantizeLinear."""
    graph, (stored, scale, *zero) = node.graph, node.inputs
    steps, values = constant(scale), constant(stored)
    if not zero:
        node.resize_inputs(3)
        node.replace_input_with(2, add_constant(graph, f"{scale.name}.zero", np.zeros(steps.shape, np.int8)))
    if values is None:
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    broadcast = steps.reshape([-1 if index == axis else 1 for index in range(values.ndim)]) if steps.ndim else steps
    weight = add_constant(graph, f"{stored.name.removesuffix('.int8')}.float32", values * broadcast)
    attributes = [ir.AttrInt64("axis", axis)]
    quantize = ir.Node("", "QuantizeLinear", [weight, *node.inputs[1:]], attributes=attributes, name=f"{weight.name}.quantize")
    node.prepend(quantize)
    node.replace_input_with(0, quantize.outputs[0])


def _lower(node: ir.Node) -> None:
    """Write a node as in operator set 17."""
    if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.inputs) > 1:
        axes = constant(node.inputs[1])
        node.resize_inputs(1)
        _drop(node, {"noop_with_empty_axes": 0})
        node.attributes["axes"] = ir.AttrInt64s("axes", axes.tolist())
    elif node.op_type in _NEW_ATTRIBUTES:
        _drop(node, _NEW_ATTRIBUTES[node.op_type])
    elif defs.get_schema(node.op_type, OPSET + 1).since_version > OPSET:
        raise ValueError(f"node {node.name} is a {node.op_type} of operator set 18, which has no form in 17; leave --builtin-plugin out")


def _drop(node: ir.Node, absent: dict[str, object]) -> None:
    """Remove attributes whose value is the one in `absent`."""
    for name, same in absent.items():
        attribute = node.attributes.pop(name, None)
        if attribute is not None and same is not None and attribute.value != same:
            value = attribute.value
            raise ValueError(f"{name}={value!r} of node {node.name} has no form in operator set 17; leave --builtin-plugin out")
