"""The attentions by the plugin that TensorRT brings itself, for versions that cannot take ours: 8.6 to 10.6.

Softmax and locations become plain nodes around `MultiscaleDeformableAttnPlugin_TRT`; the cameras of spatial cross-attention are its batch.
The plugin has one type for values and locations, float32 or float16, so that float16 would move the points.

The file holds no body of it: TensorRT 8.6 does not look at local functions, but 9.0 to 10.6 take one before a plugin of that name.
`with_bodies` gives them to onnxruntime. The domain of the node is ours, since onnx knows the nodes of its own domain; TensorRT's parser
looks for a plugin by name, version and the attribute plugin_namespace.

Sources: plugin/multiscaleDeformableAttnPlugin of NVIDIA/TensorRT at release/8.6; onnx/onnx-tensorrt at release/8.6-GA and 10.1-GA.
B batch, N cameras, S keys of all levels, M heads, C channels a head, Q queries, D pillar points, L levels, P points.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from export import functions
from export.graph import Graph, declare_opset, integers, opset, shapes
from qdbev import schema

_PLUGIN = {"plugin_namespace": "", "plugin_version": "1"}


def use(model: onnx.ModelProto) -> int:
    """Replace every attention in place, and return the number of replacements."""
    graph, known = Graph(model), shapes(model)
    nodes: list[NodeProto] = []
    found = 0
    for node in graph.proto.node:
        if node.op_type not in _WRITERS:
            nodes.append(node)
            continue
        written = _Nodes(graph, node)
        _WRITERS[node.op_type](written, [(name, known[name]) for name in node.input])
        nodes.extend(written.list)
        found += 1
    del graph.proto.node[:]
    graph.proto.node.extend(nodes)
    graph.prune()
    for function in [function for function in model.functions if function.name in _WRITERS]:
        model.functions.remove(function)
    return found


def with_bodies(model: onnx.ModelProto) -> bool:
    """Let a model that calls the plugin call local functions instead, in place; False where it calls none.

    There is one for each number of levels and points, which are part of its name.
    """
    nodes = [node for node in model.graph.node if node.op_type == functions.BUILTIN]
    known, bodies = shapes(model) if nodes else {}, {}
    for node in nodes:
        sizes = functions.Sizes(*known[node.input[4]][-2:])
        node.op_type = f"{functions.BUILTIN}_{sizes.levels}_{sizes.points}"
        bodies[node.op_type] = functions.body(functions.BUILTIN, sizes)
    for name, body in bodies.items():
        body.name = name
        model.functions.append(body)
    if bodies:
        declare_opset(model, opset(model))
    return bool(bodies)


_Input = tuple[str, tuple[int, ...]]
"""Name and shape."""


class _Nodes:
    """The nodes that stand for one attention, in order. Calling it adds one and returns its output's name; lists become constants."""

    def __init__(self, graph: Graph, node: NodeProto) -> None:
        self.list: list[NodeProto] = []
        self.result = node.output[0]
        self._graph, self._name = graph, node.name
        self._level_hw = np.reshape(integers(node, "level_hw", []), (-1, 2))

    def __call__(self, op_type: str, *inputs: str | Sequence[int], output: str = "", **attributes: Any) -> str:
        names = [given if isinstance(given, str) else self.constant(np.array(given)) for given in inputs]
        name = f"{self._name}/{op_type}_{len(self.list)}"
        self.list.append(helper.make_node(op_type, names, [output or name], name=name, **attributes))
        return self.list[-1].output[0]

    def constant(self, values: np.ndarray) -> str:
        return self._graph.add_constant(f"{self._name}.constant", values)

    def offsets(self, offsets: str) -> str:
        """(B, Q, M, L, P, 2) in 0..1 of their level instead of cells."""
        level_wh = self._level_hw[:, None, ::-1].astype(np.float32)  # (L, 1, 2)
        return self("Div", offsets, self.constant(level_wh))

    def weights(self, logits: _Input) -> str:
        """Softmax of logits (B, Q, M, L, P) over levels and points, in their shape."""
        flat = self("Softmax", self("Reshape", logits[0], [0, 0, 0, -1]), axis=-1)  # (B, Q, M, L*P)
        return self("Reshape", flat, logits[1])

    def plugin(self, value: str, locations: str, weights: str) -> str:
        """value (B, S, M, C) read at locations (B, Q, M, L, P, 2) and summed with weights (B, Q, M, L, P): (B, Q, M, C)."""
        sizes = self._level_hw.prod(1)
        places = [self.constant(values.astype(np.int32)) for values in (self._level_hw, np.cumsum(sizes) - sizes)]
        read = self(functions.BUILTIN, value, *places, locations, weights, domain=schema.OP_DOMAIN, **_PLUGIN)
        self.list[-1].name = self._name
        return read


def _multi_scale_deformable_attention(nodes: _Nodes, inputs: list[_Input]) -> None:
    value, reference_points, offsets, logits = inputs
    reference = nodes("Unsqueeze", reference_points[0], [2, 3, 4])  # (B, Q, 1, 1, 1, 2)
    locations = nodes("Add", reference, nodes.offsets(offsets[0]))  # (B, Q, M, L, P, 2)
    read = nodes.plugin(value[0], locations, nodes.weights(logits))
    nodes("Reshape", read, [0, 0, -1], output=nodes.result)  # (B, Q, M*C)


def _spatial_cross_attention(nodes: _Nodes, inputs: list[_Input]) -> None:
    value, reference_points, visible, offsets, logits = inputs
    (B, N, *keys), D, points = value[1], reference_points[1][3], logits[1][1:]
    of_query = nodes("Reshape", nodes.offsets(offsets[0]), [B, 1, points[0], -1, D, 2])  # (B, 1, Q, M*L*P/D, D, 2)
    locations = nodes("Add", nodes("Unsqueeze", reference_points[0], [3]), of_query)  # (B, N, Q, M*L*P/D, D, 2)
    locations = nodes("Reshape", locations, [B * N, *points, 2])  # (B*N, Q, M, L, P, 2)
    weights = nodes("Expand", nodes("Unsqueeze", nodes.weights(logits), [1]), [B, N, *points])
    weights = nodes("Reshape", weights, [B * N, *points])  # (B*N, Q, M, L, P)
    read = nodes.plugin(nodes("Reshape", value[0], [B * N, *keys]), locations, weights)  # (B*N, Q, M, C)
    read = nodes("Reshape", read, [B, N, points[0], -1])  # (B, N, Q, M*C)
    masked = nodes("Mul", read, nodes("Unsqueeze", visible[0], [3]))
    total = nodes("ReduceSum", masked, [1], keepdims=0)  # (B, Q, M*C)
    count = nodes("ReduceSum", visible[0], [1], keepdims=0)  # (B, Q)
    count = nodes("Max", count, nodes.constant(np.float32(1)))
    nodes("Div", total, nodes("Unsqueeze", count, [2]), output=nodes.result)


_WRITERS = {functions.MSDA: _multi_scale_deformable_attention, functions.SCA: _spatial_cross_attention}
