"""Types the float part of a deployed graph as float16; geometry stays float32.

Strongly typed engines take the type of every tensor from the ONNX. These stay float32:

    inputs and outputs of the graph
    what depends on geometry inputs alone, up to the first LayerNorm: projection, reference points, rotation, the MLP of can_bus
    coordinates and logits of the custom operators, and outputs that are coordinates, from the product on that computes them, or from the
        inputs of that product on if it is an integer product
    the inside of the operators' bodies: their value is cast to float32 and their output to float16

An integer product has the type of its scales, and an operator with an integer value that of `value_scale`. The scales themselves have few
enough significant bits to be the same in float16 (qdbev/quant/quantizer.py), down to 5e-7.
"""

from collections import defaultdict
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from export.graph import PRODUCTS, add_constant, constant, declare_opset, infer_shapes, remove_unused, sources
from qdbev.ops import contract
from qdbev.schema import Interface

OPSET = 19
"""The first operator set whose QuantizeLinear takes float16."""
_WIDE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Split", "Gather", "GatherND", "Clip", "MaxPool")
"""Operators that keep the type of their input, as QuantizeLinear does: a cast before them would round once more."""


def to_float16(model: ir.Model, interface: Interface) -> int:
    """Type `model` in place, and return the number of nodes with a float16 output.

    Raises:
        ValueError: A constant is too large for float16, or a deformable convolution is ONNX's own node, which has one type for all inputs.
    """
    if any(node.op_type == "DeformConv" for node in model.graph):
        raise ValueError("DeformConv has one type for features and offsets; float16 would move its taps: leave --standard-deform-conv out")
    infer_shapes(model)
    typing = _Typing(model.graph, _geometry(model.graph, interface.geometry) | _coordinates(model.graph, interface.coordinates))
    for node in list(model.graph):
        typing.type_node(node)
    typing.type_outputs()
    remove_unused(model)
    for function in model.functions.values():
        _widen_inside(function)
    declare_opset(model, OPSET)
    return sum(any(value.dtype == _HALF for value in node.outputs) for node in model.graph)


class _Typing:
    """Gives every node of a graph its type, in order, and adds the casts that it needs."""

    def __init__(self, graph: ir.Graph, wide: set[ir.Value]) -> None:
        """Prepare to type `graph`; the nodes whose first outputs are in `wide` stay float32."""
        self._graph, self._wide = graph, wide
        known = (*graph.inputs, *graph.initializers.values())
        self._floats = {value for value in (*known, *(value for node in graph for value in node.outputs)) if value.dtype == _WIDE}
        self._forms: dict[ir.Value, dict[ir.DataType, ir.Value]] = defaultdict(dict)
        """Each float tensor in the types that exist so far. The original value is the first form."""
        self._scales: dict[ir.Node, ir.Value] = {}
        """The float32 scale of each DequantizeLinear that has a type."""
        for value in self._floats.intersection(known):
            self._forms[value][_WIDE] = value

    def type_node(self, node: ir.Node) -> None:
        """Type the next node. A DequantizeLinear is typed later, when its first reader is, as this reader needs it."""
        if node.op_type == "DequantizeLinear":
            return
        kind = self._kind(node)
        num_values = len(contract.OPERATORS[node.op_type].value_inputs) if node.domain == contract.DOMAIN else len(node.inputs)
        for index, value in enumerate(node.inputs):
            is_fixed = node.op_type == "Resize" and index > 0
            if value in self._floats and not is_fixed:
                node.replace_input_with(index, self._in_type(value, kind if index < num_values else _WIDE, node))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _WIDE:
            node.attributes["to"] = ir.AttrInt64("to", kind)
        for value in self._floats.intersection(node.outputs):
            self._set_type(value, kind)

    def type_outputs(self) -> None:
        """Make every output of the graph float32, under its name."""
        for index, value in enumerate(list(self._graph.outputs)):
            wide = self._in_type(value, _WIDE, None) if value in self._floats else value
            if wide is not value:
                value.name, wide.name = f"{value.name}.float16", value.name
                self._graph.outputs[index] = wide

    def _kind(self, node: ir.Node) -> ir.DataType:
        if node.domain:
            return _HALF
        if node.outputs[0] in self._wide:
            return _WIDE
        value = node.inputs[0] if node.inputs else None
        moves = node.op_type in _MOVES or node.op_type == "QuantizeLinear"
        only_wide = value is not None and not value.is_initializer() and list(self._forms.get(value, ())) == [_WIDE]
        return _WIDE if moves and only_wide else _HALF

    def _in_type(self, value: ir.Value, kind: ir.DataType, reader: ir.Node | None) -> ir.Value:
        """The tensor `value` in a type, created before the node `reader` (None: at the end) if it does not exist yet."""
        forms = self._forms[value]
        if kind in forms:
            return forms[kind]
        producer, suffix = value.producer(), kind.name.lower()
        if value.is_initializer():
            forms[kind] = add_constant(self._graph, f"{value.name}.{suffix}", _to_float16(value.name, constant(value)))
            return forms[kind]
        if producer is not None and producer.op_type == "DequantizeLinear":
            stored, _, *zero = producer.inputs
            scale = self._in_type(self._scales.setdefault(producer, producer.inputs[1]), kind, producer)
            if not forms:
                producer.replace_input_with(1, scale)
                self._set_type(value, kind)
                return value
            node = ir.node("DequantizeLinear", [stored, scale, *zero], producer.attributes, name=f"{producer.name}.{suffix}")
        else:
            node = ir.node("Cast", [next(iter(forms.values()))], {"to": kind}, name=f"{value.name}.to_{suffix}")
        forms[kind] = node.outputs[0]
        forms[kind].dtype, forms[kind].shape = kind, value.shape
        if reader is None:
            self._graph.append(node)
        else:
            reader.prepend(node)
        return forms[kind]

    def _set_type(self, value: ir.Value, kind: ir.DataType) -> None:
        value.type = ir.TensorType(kind)  # a new object, because copies of a graph share theirs
        self._forms[value][kind] = value


def _geometry(graph: ir.Graph, inputs: Collection[str]) -> set[ir.Value]:
    """First outputs of the nodes that depend on geometry inputs alone, until a LayerNorm has brought them to unit scale.

    Nodes that compute constants for these are among them.
    """
    depends = sources(graph)
    inside, found = {value for value in graph.inputs if value.name in inputs}, set()
    for node in graph:
        if depends[node.outputs[0]] and all(value in inside or not depends.get(value) for value in node.inputs):
            found.add(node.outputs[0])
            if node.op_type != "LayerNormalization":
                inside.update(node.outputs)
    for node in reversed(graph):
        if not depends[node.outputs[0]] and any(reader.outputs[0] in found for value in node.outputs for reader in value.consumers()):
            found.add(node.outputs[0])
    return found


def _coordinates(graph: ir.Graph, outputs: Collection[str]) -> set[ir.Value]:
    """First outputs of the nodes between a matrix product and the graph outputs `outputs`, or inputs of custom operators but their value.

    An integer product itself is among them, a float product is not.
    """
    ends = {value for value in graph.outputs if value.name in outputs}
    for node in graph:
        if node.domain == contract.DOMAIN:
            ends.update(node.inputs[len(contract.OPERATORS[node.op_type].value_inputs) :])
    found: set[ir.Value] = set()
    for node in reversed(graph):
        weight = node.inputs[1].producer() if node.op_type in PRODUCTS else None
        is_integer_product = weight is not None and weight.op_type == "DequantizeLinear"
        if node.domain or node.op_type == "QuantizeLinear" or (node.op_type in PRODUCTS and not is_integer_product):
            continue
        readers = [reader for value in node.outputs for reader in value.consumers() if reader.op_type not in PRODUCTS]
        if ends.intersection(node.outputs) or any(reader.outputs[0] in found for reader in readers):
            found.add(node.outputs[0])
    return found


def _to_float16(name: str, values: np.ndarray) -> np.ndarray:
    """A constant in float16. A positive number stays positive, as a scale must."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if (np.isfinite(values) & ~np.isfinite(half)).any():
        raise ValueError(f"constant {name} reaches {np.abs(values).max():.3g}, float16 ends at 65504; leave --float16 out")
    return np.where((values > 0) & (half == 0), np.finfo(np.float16).smallest_subnormal, half).astype(np.float16)


def _widen_inside(function: ir.Function) -> None:
    """Let a body compute in float32 whatever the type of its value, and return float16. An integer value is float32 there in any case."""
    output = function.outputs[0]
    if not contract.OPERATORS[function.name].has_integer_value:
        value = function.inputs[0]
        cast = ir.node("Cast", [value], {"to": _WIDE}, name="")
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        function.insert_before(function[0], cast)
    cast = ir.node("Cast", [output], {"to": _HALF}, name="")
    output.name, cast.outputs[0].name = f"{output.name}_float32", output.name
    function.append(cast)
    function.outputs[0] = cast.outputs[0]
