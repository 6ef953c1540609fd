"""Values reach the attention operators as integers: QuantizeLinear -> operator(value int8, value_scale, ...).

With strong typing a kernel gets the tensor that stands in the graph. Behind a DequantizeLinear that is a float one, four times the
bytes to gather; TensorRT tells a plugin no scale, so it is an input.
"""

import onnx
from onnx import NodeProto

from export import functions
from export.graph import Graph, unused

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")


def pass_on(model: onnx.ModelProto) -> int:
    """Let the attention operators read what lies before the DequantizeLinear of their value, in place, and return the number that do.

    The numbers stay exactly the same. Other readers keep the DequantizeLinear, and a value that is not quantized keeps its operator.
    """
    graph = Graph(model)
    nodes: list[NodeProto] = []
    taken = graph.producers.keys() | graph.initializers.keys()
    integers: dict[str, tuple[str, str]] = {}  # int8 tensor and scale of a float one
    found = 0
    for node in graph.proto.node:
        value = node.input[0] if node.input else ""
        if node.op_type == "DequantizeLinear" and _has_one_scale(graph, node):
            integers[node.output[0]] = (value, node.input[1])
        elif node.op_type in _MOVES and value in integers:
            integer, scale = integers[value]
            nodes.append(_on_integers(node, integer, taken))  # pruned where no operator reads it
            integers[node.output[0]] = (nodes[-1].output[0], scale)
        elif node.domain and node.op_type in functions.INTEGER_VALUE and value in integers:
            node.op_type = functions.INTEGER_VALUE[node.op_type]
            node.input[:] = [*integers[value], *node.input[1:]]
            found += 1
        nodes.append(node)
    if found:
        del graph.proto.node[:]
        graph.proto.node.extend(nodes)
        graph.prune()
        functions.attach(model)
    return found


def _has_one_scale(graph: Graph, dequantize: NodeProto) -> bool:
    """Whether an int8 times a number is what it gives."""
    _, scale, *zero = (graph.constant(name) for name in dequantize.input)
    return scale is not None and scale.ndim == 0 and all(point is not None and not point.any() for point in zero)


def _on_integers(move: NodeProto, value: str, taken: set[str]) -> NodeProto:
    """The same move of the int8 tensor `value`."""
    copy = NodeProto()
    copy.CopyFrom(move)
    copy.name = f"{move.name}.int8"
    copy.input[0] = value
    copy.output[0] = unused(f"{move.output[0]}.int8", taken)
    taken.add(copy.output[0])
    return copy
