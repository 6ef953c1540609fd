"""Attaches ONNX local functions: the bodies of the custom operators, for every runtime that has no kernel for them.

A body takes `level_hw` or `stride` from the attributes of the node. Only the numbers of levels and points are fixed when it is made.
"""

from collections.abc import Callable

import onnx_ir as ir

from export.bodies.attention import msda, sca
from export.bodies.im2col import im2col
from export.bodies.nodes import BodyNodes, Inputs, Sizes
from export.graph import infer_shapes
from qdbev.ops import contract

_BODIES: dict[str, Callable[[BodyNodes, Inputs], ir.Value]] = {
    contract.MSDA.name: msda,
    contract.SCA.name: sca,
    contract.IM2COL.name: im2col,
}
"""The function that creates the nodes of each operator and returns its output."""
_BODIES |= {integer.name: _BODIES[name] for name, integer in contract.INTEGER_FORMS.items()}


def attach(model: ir.Model) -> None:
    """Add to `model` a body for each custom operator that it uses, and remove all other functions.

    Raises:
        ValueError: A node of the domain is no operator of the contract, the shape of an attention's sampling offsets is unknown, or one
            operator is used with different numbers of levels or points.
    """
    sizes: dict[str, set[Sizes]] = {}
    model.functions.clear()
    infer_shapes(model)
    for node in model.graph:
        if node.domain == contract.DOMAIN:
            sizes.setdefault(node.op_type, set()).add(_sizes(node))
    if sizes:
        model.opset_imports.setdefault(contract.DOMAIN, contract.VERSION)
    for name, found in sizes.items():
        if len(found) > 1:
            levels, points = (sorted(set(counts)) for counts in zip(*found, strict=True))
            raise ValueError(f"{name} is used with {levels} levels and {points} points; one ONNX function has one number of each")
        function = _function(contract.OPERATORS[name], found.pop())
        model.functions[function.identifier()] = function


def _sizes(node: ir.Node) -> Sizes:
    """Numbers of levels and points of a custom node, from the shape of its sampling offsets."""
    if node.op_type not in _BODIES:
        raise ValueError(f"node {node.name} is a {node.domain}::{node.op_type}; bodies exist for {', '.join(_BODIES)}")
    offsets = dict(zip(contract.OPERATORS[node.op_type].inputs, node.inputs, strict=True)).get("sampling_offsets")
    if offsets is None:
        return Sizes()
    if offsets.shape is None or not offsets.shape.is_static():
        raise ValueError(f"the shape of {offsets.name}, the sampling offsets of node {node.name}, does not follow from the graph")
    levels, points, _ = offsets.shape.numpy()[-3:]
    return Sizes(levels, points)


def _function(operator: contract.Operator, sizes: Sizes) -> ir.Function:
    """The local function of an operator. It also declares the attributes by which TensorRT finds a plugin."""
    nodes, inputs = BodyNodes(sizes), {name: ir.Value(name=name) for name in operator.inputs}
    output = _BODIES[operator.name](nodes, inputs)
    output.name = "output"
    graph = ir.Graph(list(inputs.values()), [output], nodes=nodes.nodes, opset_imports={"": contract.OPSET}, name=operator.name)
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in (*operator.attributes, *contract.PLUGIN_ATTRIBUTES)]
    return ir.Function(contract.DOMAIN, operator.name, graph=graph, attributes=declared)
