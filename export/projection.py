"""The projection into the cameras as multiplications and sums instead of a matrix product.

A point is three sums of four products, so a product of matrices saves nothing. It would cost kernels, and exactness: an engine may compute
it in TF32, whose ten bits move a point by more than a pixel.
"""

import numpy as np
import onnx
from onnx import NodeProto, helper

from export.graph import Graph

EQUATION = b"bnij,dkj->bnkdi"
"""Matrices (B, N, I, J) and homogeneous points (D, K, J) to (B, N, K, D, I), as in qdbev/geometry.py."""


def write_out(model: onnx.ModelProto) -> int:
    """Replace every projection in place, and return their number."""
    graph = Graph(model)
    nodes: list[NodeProto] = []
    found = 0
    for node in graph.proto.node:
        if node.op_type == "Einsum" and _equation(node) == EQUATION:
            nodes.extend(_written_out(graph, node))
            found += 1
        else:
            nodes.append(node)
    del graph.proto.node[:]
    graph.proto.node.extend(nodes)
    graph.prune()
    return found


def _written_out(graph: Graph, node: NodeProto) -> list[NodeProto]:
    """Nodes that give the output of the Einsum `node`; rows are chosen from what they give, so that none has to be copied before."""
    matrices, points = node.input
    result, name = node.output[0], node.name
    axes = [graph.add_constant(f"{name}.axes", np.array(values)) for values in ([2, 3], [0, 1, 4], [5], [4])]
    choice = graph.producers.get(matrices)
    chosen = choice is not None and choice.op_type == "Slice" and np.array_equal(graph.constant(choice.input[3]), [2])
    all_rows = f"{result}.all_rows" if chosen else result
    nodes = [
        helper.make_node("Unsqueeze", [choice.input[0] if chosen else matrices, axes[0]], [f"{result}.rows"]),  # (B, N, 1, 1, I, J)
        helper.make_node("Transpose", [points], [f"{result}.cells"], perm=[1, 0, 2]),  # (K, D, J)
        helper.make_node("Unsqueeze", [f"{result}.cells", axes[1]], [f"{result}.points"]),  # (1, 1, K, D, 1, J)
        helper.make_node("Mul", [f"{result}.rows", f"{result}.points"], [f"{result}.products"]),
        helper.make_node("ReduceSum", [f"{result}.products", axes[2]], [all_rows], keepdims=0),  # (B, N, K, D, I)
    ]
    if chosen:
        starts, ends, _, *steps = choice.input[1:]
        nodes.append(helper.make_node("Slice", [all_rows, starts, ends, axes[3], *steps], [result]))
    for made in nodes:
        made.name = f"{name}/{made.op_type}_{made.output[0]}"
    return nodes


def _equation(node: NodeProto) -> bytes:
    return next(attribute.s for attribute in node.attribute if attribute.name == "equation").replace(b" ", b"")
