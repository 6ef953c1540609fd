"""Gives the attention operators their quantized values as int8: QuantizeLinear -> operator(int8 value, value_scale, ...).

A plugin receives its input exactly as it is typed in the ONNX. After DequantizeLinear that is float32, four times the bytes to gather. So
the int8 tensor is passed instead, and its scale as an input, because TensorRT does not pass scales to plugins.
"""

import onnx_ir as ir

from export.bodies.attach import attach
from export.graph import PassError, before_reordering, constant, remove_unused
from qdbev.ops import contract

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")
"""Operators between the DequantizeLinear and the attention that are applied to the int8 tensor instead."""


def feed_int8_values(model: ir.Model) -> int:
    """Let every attention read the int8 tensor before the DequantizeLinear of its value, and return the number of these attentions.

    Other readers keep the DequantizeLinear, and an attention whose value is not quantized keeps its operator.

    Raises:
        PassError: The value of an attention comes from a DequantizeLinear that cannot be left out.
    """
    integers: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # int8 tensor and scale of a float tensor
    found = 0
    for node in list(model.graph):
        value = node.inputs[0] if node.inputs else None
        if node.op_type == "DequantizeLinear" and _has_one_scale(node):
            integers[node.outputs[0]] = (value, node.inputs[1])
        elif node.op_type in _MOVES and value in integers:
            integer, scale = integers[value]
            integers[node.outputs[0]] = (_repeated_on(node, integer), scale)  # removed below where no attention reads it
        elif node.domain == contract.DOMAIN and node.op_type in contract.INTEGER_FORMS and value in integers:
            node.op_type = contract.INTEGER_FORMS[node.op_type].name
            inputs = (*integers[value], *node.inputs[1:])
            node.resize_inputs(len(inputs))
            for index, given in enumerate(inputs):
                node.replace_input_with(index, given)
            found += 1
    remove_unused(model)
    if found:
        attach(model)
    _check(model)
    return found


def _has_one_scale(dequantize: ir.Node) -> bool:
    """Return whether the output is an integer times one number: a scalar constant scale and zero point 0."""
    _, scale, *zero = dequantize.inputs
    number, *zeros = (constant(value) for value in (scale, *zero))
    return number is not None and number.ndim == 0 and all(point is not None and not point.any() for point in zeros)


def _repeated_on(move: ir.Node, integer: ir.Value) -> ir.Value:
    """Output of the same operation on an int8 tensor, as a new node before `move`."""
    copy = ir.node(move.op_type, [integer, *move.inputs[1:]], move.attributes, name=f"{move.name}.int8")
    copy.outputs[0].dtype, copy.outputs[0].shape = ir.DataType.INT8, move.outputs[0].shape
    move.prepend(copy)
    return copy.outputs[0]


def _check(model: ir.Model) -> None:
    """Raise PassError if an attention still reads a quantized value as floats."""
    for node in model.graph:
        if node.domain != contract.DOMAIN or node.op_type not in contract.INTEGER_FORMS:
            continue
        dequantize = before_reordering(node.inputs[0]).producer()
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            raise PassError(
                f"feed_int8_values: the value of {node.name} is quantized, but {node.op_type} would read it as floats. The pass looks for "
                f"a DequantizeLinear with one scale and zero point 0, with only {', '.join(_MOVES)} between it and the attention; it found "
                f"{dequantize.name}"
            )
