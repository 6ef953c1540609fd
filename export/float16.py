"""The float part of a deployed graph typed as float16; geometry stays float32.

Strongly typed engines take the type of every tensor from the ONNX. These stay float32:

    inputs and outputs of the graph, as qdbev/schema.py says
    what calibration and motion alone decide, up to the first LayerNorm: projection, reference points, rotation, the MLP of can_bus
    coordinates and logits of the custom operators and the box code, from the product on that gives them; an integer product included
    the inside of the operators' bodies: the value they read is widened, what they give is rounded

An integer product has the type of its scales, and an operator with an integer value that of `value_scale`. The scales themselves have few
enough significant bits to be the same in float16 (qdbev/quant/quantizer.py), down to 5e-7.
"""

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper

from export import functions
from export.graph import Graph, declare_opset, unused

OPSET = 19
"""The first operator set whose QuantizeLinear takes float16."""
_WIDE, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_SUFFIX = {_WIDE: "float32", _HALF: "float16"}
_GEOMETRY_INPUTS = {"lidar2img", "can_bus", "has_prev"}
_BOX_CODE = "box_code"
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Split", "Gather", "GatherND", "Clip", "MaxPool")
"""Nodes that have the type of what they move, and with them QuantizeLinear: a cast before them would be one more rounding."""


def convert(model: onnx.ModelProto) -> None:
    """Type `model` in place.

    Raises:
        ValueError: A constant is too large for float16, or a deformable convolution is ONNX's own node, which knows one type only.
    """
    if any(node.op_type == "DeformConv" for node in model.graph.node):
        raise ValueError(
            "DeformConv has one type for features and offsets, so float16 would move its taps; leave --standard-deform-conv out"
        )
    graph = Graph(model)
    typing = _Typing(graph, _float_names(model), _geometry(graph) | _coordinates(graph))
    for node in list(graph.proto.node):
        typing.add(node)
    for name in sorted(graph.outputs):
        typing.typed(name, _WIDE)
    del graph.proto.node[:]
    graph.proto.node.extend(typing.nodes)
    _retype_infos(graph, typing.half)
    graph.prune()
    for function in model.functions:
        _widen_inside(function)
    declare_opset(model, OPSET)


class _Typing:
    """The nodes of a graph once more, in order, each in its type and with the casts that it needs before it."""

    def __init__(self, graph: Graph, floats: set[str], wide: set[str]) -> None:
        """
        Args:
            floats: Names of the tensors that are float32 in the graph as it is.
            wide: First outputs of the nodes that stay so.
        """
        self.nodes: list[NodeProto] = []
        self.half: dict[str, str] = {}
        """What tensors are called in float16."""
        self._graph, self._floats, self._wide = graph, floats, wide
        self._made = {(name, _WIDE): name for name in (*graph.initializers, *(entry.name for entry in graph.proto.input))}
        self._taken = {name for node in graph.proto.node for name in node.output} | graph.initializers.keys()

    def add(self, node: NodeProto) -> None:
        """The next node. A DequantizeLinear waits for a reader, whose type it takes."""
        if node.op_type == "DequantizeLinear":
            return
        kind = self._kind(node)
        for index, name in enumerate(node.input):
            wanted = _WIDE if node.domain and index >= _num_typed(node) else kind
            fixed = node.op_type == "Resize" and index > 0
            if name in self._floats and not fixed:
                node.input[index] = self.typed(name, wanted)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _WIDE:
                attribute.i = kind
        for index, name in enumerate(node.output):
            if name in self._floats:
                node.output[index] = self._name(name, kind)
        self.nodes.append(node)

    def typed(self, name: str, kind: int) -> str:
        """The tensor `name` in a type, made if it is not there yet."""
        if (name, kind) in self._made:
            return self._made[name, kind]
        producer = self._graph.producers.get(name)
        if name in self._graph.initializers:
            self._made[name, kind] = self._graph.add_constant(f"{name}.{_SUFFIX[kind]}", _halved(name, self._graph.constant(name)))
        elif producer is not None and producer.op_type == "DequantizeLinear":
            stored, scale, *zero = producer.input
            node = NodeProto()
            node.CopyFrom(producer)
            node.input[:] = [stored, self.typed(scale, kind), *zero]
            node.name += f".{_SUFFIX[kind]}" if self._is_made(name) else ""
            self._emit(node, name, kind)
        else:
            (other,) = (made for (made_of, _), made in self._made.items() if made_of == name)
            self._emit(helper.make_node("Cast", [other], [name], name=f"{name}.to_{_SUFFIX[kind]}", to=kind), name, kind)
        return self._made[name, kind]

    def _kind(self, node: NodeProto) -> int:
        if node.domain:
            return _HALF
        if node.output[0] in self._wide:
            return _WIDE
        moves = node.op_type in _MOVES or node.op_type == "QuantizeLinear"
        only_wide = (node.input[0], _WIDE) in self._made and (node.input[0], _HALF) not in self._made if node.input else False
        return _WIDE if moves and only_wide and node.input[0] not in self._graph.initializers else _HALF

    def _emit(self, node: NodeProto, name: str, kind: int) -> None:
        node.output[0] = self._name(name, kind)
        self.nodes.append(node)

    def _name(self, name: str, kind: int) -> str:
        """Name of a tensor in a type: its own for the first, and for the float32 one of an output of the graph."""
        kept = name in self._graph.outputs and kind == _WIDE
        free = not self._is_made(name) and name not in self._graph.outputs
        found = name if kept or free else unused(f"{name}.{_SUFFIX[kind]}", self._taken)
        self._taken.add(found)
        self._made[name, kind] = found
        if kind == _HALF:
            self.half[name] = found
        return found

    def _is_made(self, name: str) -> bool:
        return any((name, kind) in self._made for kind in _SUFFIX)


def _retype_infos(graph: Graph, half: dict[str, str]) -> None:
    """Let the shapes that the graph states speak of the float16 tensors."""
    infos = [info for info in graph.proto.value_info if info.name not in half]
    for info in (*graph.proto.value_info, *graph.proto.output):
        if info.name in half:
            infos.append(onnx.ValueInfoProto())
            infos[-1].CopyFrom(info)
            infos[-1].name = half[info.name]
            infos[-1].type.tensor_type.elem_type = _HALF
    del graph.proto.value_info[:]
    graph.proto.value_info.extend(infos)


def _float_names(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    infos = (*inferred.input, *inferred.output, *inferred.value_info)
    found = {info.name for info in infos if info.type.tensor_type.elem_type == _WIDE}
    return found | {tensor.name for tensor in inferred.initializer if tensor.data_type == _WIDE}


def _geometry(graph: Graph) -> set[str]:
    """First outputs of the nodes that depend on calibration and motion alone, until a LayerNorm has brought them to unit scale."""
    constant, inside, found = {"", *graph.initializers}, set(_GEOMETRY_INPUTS), set()
    for node in graph.proto.node:
        if constant.issuperset(node.input):
            constant.update(node.output)
        elif all(name in inside or name in constant for name in node.input):
            found.add(node.output[0])
            found |= _constants_behind(graph, [name for name in node.input if name in constant])
            if node.op_type != "LayerNormalization":
                inside.update(node.output)
    return found


def _coordinates(graph: Graph) -> set[str]:
    """First outputs of the nodes from products to the box code, and to the custom operators' inputs but their value."""
    found, left = set(), [name for node in graph.proto.node if node.domain for name in node.input[_num_typed(node) :]]
    left.append(_BOX_CODE)
    while left:
        node = graph.producers.get(left.pop())
        if node is None or node.output[0] in found or node.op_type == "QuantizeLinear" or node.domain:
            continue
        if node.op_type not in _PRODUCTS:
            left.extend(node.input)
        elif not _of_integers(graph, node):
            continue
        found.add(node.output[0])
    return found


def _num_typed(node: NodeProto) -> int:
    """How many inputs of a custom operator say what there is, in the operator's type; the others say where."""
    return 2 if node.op_type in functions.INTEGER_VALUE.values() else 1


def _of_integers(graph: Graph, product: NodeProto) -> bool:
    weight = graph.producers.get(product.input[1])
    return weight is not None and weight.op_type == "DequantizeLinear"


def _constants_behind(graph: Graph, names: list[str]) -> set[str]:
    """First outputs of the nodes that compute the constant tensors `names`."""
    found = set()
    while names:
        node = graph.producers.get(names.pop())
        if node is not None:
            found.add(node.output[0])
            names.extend(node.input)
    return found


def _halved(name: str, values: np.ndarray) -> np.ndarray:
    """float16 of a constant; what is positive stays so, as a scale must."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if (np.isfinite(values) & ~np.isfinite(half)).any():
        raise ValueError(f"constant {name} reaches {np.abs(values).max():.3g}, float16 ends at 65504; leave --float16 out")
    return np.where((values > 0) & (half == 0), np.finfo(np.float16).smallest_subnormal, half).astype(np.float16)


def _widen_inside(function: FunctionProto) -> None:
    """Let a body compute in float32 whatever the type of its value, and give float16. An integer value is float32 there in any case."""
    value, output = function.input[0], function.output[0]
    widened = value if function.name in functions.INTEGER_VALUE.values() else f"{value}_float32"
    nodes = list(function.node)
    for node in nodes:
        node.input[:] = [widened if name == value else name for name in node.input]
        node.output[:] = [f"{name}_float32" if name == output else name for name in node.output]
    before = [helper.make_node("Cast", [value], [widened], to=_WIDE)] if widened != value else []
    after = helper.make_node("Cast", [f"{output}_float32"], [output], to=_HALF)
    del function.node[:]
    function.node.extend([*before, *nodes, after])
