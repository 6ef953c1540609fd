"""Expands the projection into the cameras, a matrix product over homogeneous coordinates, into multiplications and sums.

A projected point is three sums of four products, so a matrix product saves nothing. It would cost kernels, and accuracy: an engine may
compute it in TF32, whose ten mantissa bits move a point by more than a pixel.

Which products are expanded follows from the graph: those that multiply a value computed from the geometry inputs alone (calibration and
motion), and sum at most four terms. A learned layer on geometric features sums over many channels and stays a product.
"""

import math
from collections.abc import Collection

import onnx_ir as ir

from export.graph import PRODUCTS, GraphNodes, PassError, constant, infer_shapes, remove_unused, replace_node, sources

_HOMOGENEOUS = 4
"""Most terms that a sum over homogeneous coordinates has."""


def expand_projection(model: ir.Model, geometry: Collection[str]) -> int:
    """Replace every Einsum that transforms homogeneous coordinates by multiplications and sums, and return the number of replacements.

    Such an Einsum has two operands, contracts the last axis of both and no other, and meets the condition above. Its letters do not matter.
    `geometry` names the graph inputs that hold calibration and motion.

    Raises:
        PassError: A product over homogeneous coordinates is left, for example because it is a MatMul.
    """
    infer_shapes(model)
    found = 0
    for node in _coordinate_products(model, geometry):
        if node.op_type == "Einsum" and _contracts_last_axes(node):
            _expand(node)
            found += 1
    remove_unused(model)
    infer_shapes(model)
    left = _coordinate_products(model, geometry)
    if left:
        raise PassError(
            f"expand_projection: {left[0].op_type} {left[0].name} transforms coordinates by geometry inputs and may be computed in TF32. "
            "The pass looks for an Einsum of two operands that contracts the last axis of both; write the transform in this form"
        )
    return found


def _coordinate_products(model: ir.Model, geometry: Collection[str]) -> list[ir.Node]:
    """Products of at most four terms with an operand that is computed from geometry inputs alone."""
    depends = sources(model.graph)

    def is_geometric(value: ir.Value | None) -> bool:
        return value is not None and bool(depends.get(value)) and depends[value] <= set(geometry)

    products = [node for node in model.graph if node.op_type in (*PRODUCTS, "Einsum") and any(map(is_geometric, node.inputs[:2]))]
    return [node for node in products if _num_terms(node) <= _HOMOGENEOUS]


def _num_terms(node: ir.Node) -> int:
    """Terms of each sum of a product."""
    first, second = (value.shape.numpy() for value in node.inputs[:2])
    if node.op_type == "Conv":
        return math.prod(second[1:])
    if node.op_type == "Einsum":
        terms, result = _equation(node)
        sizes = {letter: size for term, shape in zip(terms, (first, second), strict=True) for letter, size in zip(term, shape, strict=True)}
        return math.prod(size for letter, size in sizes.items() if letter not in result)
    return first[0] if node.attributes.get_int("transA") else first[-1]


def _equation(node: ir.Node) -> tuple[list[str], str]:
    """Letters of each operand and of the result of an Einsum."""
    operands, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    return operands.split(","), result


def _contracts_last_axes(node: ir.Node) -> bool:
    """Return whether an Einsum of two operands sums over the last axis of both, and keeps every other axis once."""
    terms, result = _equation(node)
    if len(terms) != 2 or terms[0][-1] != terms[1][-1] or any(len(set(term)) < len(term) for term in terms):
        return False
    return sorted(result) == sorted(set(terms[0] + terms[1]) - {terms[0][-1]})


def _expand(node: ir.Node) -> None:
    """Replace an Einsum. Rows that a Slice selects from the first operand are selected from the result, so that none is copied before."""
    (matrices, points), (terms, result) = node.inputs, _equation(node)
    nodes = GraphNodes(node)
    rows = matrices.producer()
    axes = constant(rows.inputs[3]) if rows is not None and rows.op_type == "Slice" else None
    is_sliced = axes is not None and axes.size == 1 and terms[0][int(axes[0])] in result
    first = _broadcast(nodes, rows.inputs[0] if is_sliced else matrices, terms[0], result)
    products = nodes("Mul", first, _broadcast(nodes, points, terms[1], result))
    output = nodes("ReduceSum", products, [len(result)], keepdims=0)
    if is_sliced:
        starts, ends, _, *steps = rows.inputs[1:]
        output = nodes("Slice", output, starts, ends, [result.index(terms[0][int(axes[0])])], *steps)
    replace_node(node, nodes.nodes, output)


def _broadcast(nodes: GraphNodes, operand: ir.Value, term: str, result: str) -> ir.Value:
    """An operand with the axes of the result in their order and the contracted axis last; axes that it lacks get size one."""
    order = [term.index(letter) for letter in (*result, term[-1]) if letter in term]
    if order != sorted(order):
        operand = nodes("Transpose", operand, perm=order)
    missing = [axis for axis, letter in enumerate(result) if letter not in term]
    return nodes("Unsqueeze", operand, missing) if missing else operand
