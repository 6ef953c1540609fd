"""Exports the attentions as TensorRT's own plugin, for versions that cannot use this project's plugins: 8.6 to 10.6.

Never run on TensorRT 8.6: written from the sources below, and checked in onnxruntime with an ONNX body in the plugin's place.

Softmax and sampling locations become plain nodes around `MultiscaleDeformableAttnPlugin_TRT`; the cameras of spatial cross-attention become
its batch. The plugin has one type for values and locations, float32 or float16, and float16 would move the points.

The file contains no body for the plugin: TensorRT 8.6 ignores local functions, but 9.0 to 10.6 prefer one to a plugin of that name.
`with_bodies` adds bodies for onnxruntime. The node has this project's domain, because onnx checks the nodes of its own; TensorRT's parser
looks for a plugin by name, version and the attribute plugin_namespace.

Sources: plugin/multiscaleDeformableAttnPlugin of NVIDIA/TensorRT at release/8.6; onnx/onnx-tensorrt at release/8.6-GA and 10.1-GA.
B batch, N cameras, S keys of all levels, M heads, C channels of a head, Q queries, D pillar points, L levels, P points of a level.
"""

import numpy as np
import onnx
import onnx_ir as ir

from export.bodies import builtin
from export.bodies.attach import function
from export.bodies.nodes import Sizes
from export.graph import GraphNodes, infer_shapes, remove_unused, replace_node
from qdbev.ops import contract

_ATTRIBUTES = {"plugin_namespace": "", "plugin_version": "1"}
"""Attributes by which TensorRT finds its own plugin."""


def replace_attention_with_builtin_plugin(model: ir.Model) -> int:
    """Replace every attention in place, and return the number of replacements."""
    attentions = [node for node in model.graph if node.op_type in _REPLACEMENTS and node.domain == contract.DOMAIN]
    for node in attentions:
        nodes = _Nodes(node)
        result = _REPLACEMENTS[node.op_type](nodes, *node.inputs)
        replace_node(node, nodes.nodes, result)
    remove_unused(model)
    for name in _REPLACEMENTS:
        model.functions.pop((contract.DOMAIN, name, ""), None)
    return len(attentions)


def with_bodies(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model that onnxruntime can run: where `proto` calls the plugin, a copy that calls local functions, else `proto` itself.

    There is one function for each number of levels and points; both are part of its name.
    """
    if all(node.op_type != builtin.NAME for node in proto.graph.node):
        return proto
    model = ir.from_proto(proto)
    infer_shapes(model)
    for node in model.graph:
        if node.op_type == builtin.NAME:
            sizes = Sizes(*node.inputs[4].shape.numpy()[-2:])
            node.op_type = f"{builtin.NAME}_{sizes.levels}_{sizes.points}"
            body = function(node.op_type, builtin.INPUTS, (), builtin.body, sizes)
            body.opset_imports[""] = model.opset_imports[""]
            model.functions[body.identifier()] = body
    return ir.to_proto(model)


class _Nodes(GraphNodes):
    """The nodes that replace one attention."""

    def __init__(self, attention: ir.Node) -> None:
        super().__init__(attention)
        self._plugin_name = attention.name
        self._level_hw = np.reshape(attention.attributes["level_hw"].as_ints(), (-1, 2))

    def normalised_offsets(self, offsets: ir.Value) -> ir.Value:
        """(B, Q, M, L, P, 2) as fractions of their level, from cells."""
        level_wh = self._level_hw[:, None, ::-1].astype(np.float32)  # (L, 1, 2)
        return self("Div", offsets, self.constant(level_wh))

    def weights(self, logits: ir.Value) -> ir.Value:
        """Softmax of logits (B, Q, M, L, P) over levels and points, in their shape."""
        flat = self("Softmax", self("Reshape", logits, [0, 0, 0, -1]), axis=-1)  # (B, Q, M, L*P)
        return self("Reshape", flat, list(logits.shape.numpy()))

    def plugin(self, value: ir.Value, locations: ir.Value, weights: ir.Value) -> ir.Value:
        """(B, Q, M, C) sum of value (B, S, M, C) at locations (B, Q, M, L, P, 2) with weights (B, Q, M, L, P)."""
        sizes = self._level_hw.prod(1)
        spatial_shapes, starts = (self.constant(values.astype(np.int32)) for values in (self._level_hw, np.cumsum(sizes) - sizes))
        read = self(builtin.NAME, value, spatial_shapes, starts, locations, weights, domain=contract.DOMAIN, **_ATTRIBUTES)
        read.producer().name = self._plugin_name
        return read


def _multi_scale_deformable_attention(
    nodes: _Nodes, value: ir.Value, reference_points: ir.Value, offsets: ir.Value, logits: ir.Value
) -> ir.Value:
    reference = nodes("Unsqueeze", reference_points, [2, 3, 4])  # (B, Q, 1, 1, 1, 2)
    locations = nodes("Add", reference, nodes.normalised_offsets(offsets))  # (B, Q, M, L, P, 2)
    read = nodes.plugin(value, locations, nodes.weights(logits))
    return nodes("Reshape", read, [0, 0, -1])  # (B, Q, M*C)


def _spatial_cross_attention(
    nodes: _Nodes, value: ir.Value, reference_points: ir.Value, visible: ir.Value, offsets: ir.Value, logits: ir.Value
) -> ir.Value:
    (B, N, *keys), D, points = value.shape.numpy(), reference_points.shape[3], logits.shape.numpy()[1:]
    of_query = nodes("Reshape", nodes.normalised_offsets(offsets), [B, 1, points[0], -1, D, 2])  # (B, 1, Q, M*L*P/D, D, 2)
    locations = nodes("Add", nodes("Unsqueeze", reference_points, [3]), of_query)  # (B, N, Q, M*L*P/D, D, 2)
    locations = nodes("Reshape", locations, [B * N, *points, 2])  # (B*N, Q, M, L, P, 2)
    weights = nodes("Expand", nodes("Unsqueeze", nodes.weights(logits), [1]), [B, N, *points])
    weights = nodes("Reshape", weights, [B * N, *points])  # (B*N, Q, M, L, P)
    read = nodes.plugin(nodes("Reshape", value, [B * N, *keys]), locations, weights)  # (B*N, Q, M, C)
    read = nodes("Reshape", read, [B, N, points[0], -1])  # (B, N, Q, M*C)
    masked = nodes("Mul", read, nodes("Unsqueeze", visible, [3]))
    total = nodes("ReduceSum", masked, [1], keepdims=0)  # (B, Q, M*C)
    count = nodes("ReduceSum", visible, [1], keepdims=0)  # (B, Q)
    count = nodes("Max", count, nodes.constant(np.float32(1)))
    return nodes("Div", total, nodes("Unsqueeze", count, [2]))


_REPLACEMENTS = {contract.MSDA.name: _multi_scale_deformable_attention, contract.SCA.name: _spatial_cross_attention}
"""Creates the nodes that replace an attention, by operator name; its inputs follow in the order of the contract."""
