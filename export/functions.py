"""ONNX local functions: the bodies of the custom operators, for every runtime that has no kernel of that name.

The contracts are those of qdbev/ops/{msda,sca,deform_conv}.py. Both attentions share one reading core, in which
MultiScaleDeformableAttention is the case of one camera that sees every query. Bodies take `level_hw` and `stride` from the node's
attributes; only the number of levels is fixed when a body is made.

Every camera is read for every query and masked afterwards: shapes stay static, which is what TensorRT needs. All shape arithmetic
starts at Shape nodes, which fold to constants because the deployed graph has static shapes.

B batch, N cameras, S keys of all levels, M heads, C channels a head, Q queries, D pillar points, L levels, P points.
In deformable convolution: C channels, H W the input's size, h w the output's.
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from qdbev import schema

MSDA = "MultiScaleDeformableAttention"
SCA = "SpatialCrossAttention"
IM2COL = "ModulatedDeformableIm2col"
INTEGER_VALUE = {MSDA: f"{MSDA}Int8", SCA: f"{SCA}Int8"}
"""The operators whose value is int8, with its scale () as the input behind it, by the name of those that read floats."""
BUILTIN = "MultiscaleDeformableAttnPlugin_TRT"
"""TensorRT's own plugin, which builtin_plugin.py calls. spatial_shapes is (L, 2) int32 heights and widths, level_start_index (L,) int32;
the output (B, Q, M, C)."""
INPUTS = {
    MSDA: ("value", "reference_points", "sampling_offsets", "attention_logits"),
    SCA: ("value", "reference_points", "visible", "sampling_offsets", "attention_logits"),
    IM2COL: ("x", "offsets", "mask"),
    BUILTIN: ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"),
}
"""Input names of each operator, in order."""
INPUTS |= {integer: ("value", "value_scale", *INPUTS[op_type][1:]) for op_type, integer in INTEGER_VALUE.items()}
PLUGIN = {"plugin_namespace": schema.OP_DOMAIN, "plugin_version": str(schema.OP_VERSION)}
"""Attributes that make TensorRT take a registered plugin before the body."""
_LEVELS = {"level_hw": AttributeProto.INTS}
ATTRIBUTES = dict.fromkeys((MSDA, SCA, *INTEGER_VALUE.values()), _LEVELS) | {IM2COL: {"stride": AttributeProto.INT}, BUILTIN: {}}
"""Each operator's own attributes and their types; level_hw is h0, w0, h1, w1, ..."""

_OUTPUT = "output"


def attach(model: onnx.ModelProto) -> None:
    """Give `model` a body for each custom operator it uses, and no other.

    Raises:
        ValueError: A node of the domain is no operator of ours, or one operator is used with different numbers of levels.
    """
    levels: dict[str, set[int]] = {}
    del model.functions[:]
    for node in model.graph.node:
        if node.domain != schema.OP_DOMAIN:
            continue
        if node.op_type not in _BODIES:
            raise ValueError(f"node {node.name} is a {node.domain}::{node.op_type}; bodies exist for {', '.join(_BODIES)}")
        levels.setdefault(node.op_type, set()).add(_num_levels(node))
    for op_type, counts in levels.items():
        if len(counts) > 1:
            raise ValueError(f"{op_type} is used with {sorted(counts)} levels; one ONNX function has one number of levels")
        model.functions.append(body(op_type, counts.pop()))
    if levels and schema.OP_DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(schema.OP_DOMAIN, schema.OP_VERSION))


def _num_levels(node: NodeProto) -> int:
    """Levels that a custom node reads; zero where it knows none."""
    return sum(len(attribute.ints) // 2 for attribute in node.attribute if attribute.name == "level_hw")


def body(op_type: str, levels: int) -> FunctionProto:
    """The local function of an operator for a number of levels."""
    nodes = _Nodes(integer_value=op_type in INTEGER_VALUE.values())
    _BODIES[op_type](nodes, levels)
    return helper.make_function(
        schema.OP_DOMAIN,
        op_type,
        list(INPUTS[op_type]),
        [_OUTPUT],
        nodes.list,
        [helper.make_opsetid("", schema.OPSET)],
        attributes=[*ATTRIBUTES[op_type], *PLUGIN],
    )


class _Nodes:
    """The nodes of a body, in order. Calling it adds one and returns its output's name; integers become constant tensors."""

    def __init__(self, integer_value: bool) -> None:
        self.list: list[NodeProto] = []
        self.integer_value = integer_value
        """Whether the body begins with an int8 value and its scale."""

    def __call__(self, op_type: str, *inputs: str | list[int], output: str = "", **attributes: Any) -> str:
        names = [self.constant(given) if isinstance(given, list) else given for given in inputs]
        output = output or f"{op_type}_{len(self.list)}"
        self.list.append(helper.make_node(op_type, names, [output], **attributes))
        return output

    def constant(self, values: list[int]) -> str:
        """1-D int64."""
        return self("Constant", value_ints=values)

    def scalar(self, value: float) -> str:
        """Float32 without dimensions."""
        return self("Constant", value_float=value)

    def size(self, name: str, axis: int, end: int | None = None) -> str:
        """1-D: the size of an axis, or of axis up to `end`."""
        return self("Shape", name, start=axis, end=axis + 1 if end is None else end)

    def sizes_from(self, name: str, axis: int) -> str:
        """1-D: the sizes of an axis and all after it."""
        return self("Shape", name, start=axis)

    def join(self, *parts: str | list[int]) -> str:
        """1-D: parts one after the other."""
        return self("Concat", *parts, axis=0)

    def level(self, name: str, index: int, axis: int) -> str:
        """One level of a tensor with a level axis, which vanishes."""
        return self("Gather", name, self("Constant", value_int=index), axis=axis)

    def level_hw(self) -> str:
        """(L, 2) int64 from the node's attribute."""
        return self("Reshape", self.attribute("level_hw", AttributeProto.INTS), [-1, 2])

    def attribute(self, name: str, kind: AttributeProto.AttributeType) -> str:
        """An integer attribute of the node without dimensions, or a list of them as 1-D."""
        field = "value_ints" if kind == AttributeProto.INTS else "value_int"
        node = helper.make_node("Constant", [], [f"attribute_{name}"])
        node.attribute.append(AttributeProto(name=field, ref_attr_name=name, type=kind))
        self.list.append(node)
        return node.output[0]

    def floats(self, values: list[float]) -> str:
        """1-D float32."""
        return self("Constant", value_floats=values)


def _multi_scale_deformable_attention(nodes: _Nodes, levels: int) -> None:
    level_hw = nodes.level_hw()
    reference = nodes("Unsqueeze", "reference_points", [2, 3, 4])  # (B, Q, 1, 1, 1, 2)
    locations = nodes("Add", reference, _offsets(nodes, level_hw))  # (B, Q, M, L, P, 2)
    read = _read(nodes, nodes("Unsqueeze", "value", [1]), locations, level_hw, levels)  # (B, 1, M, C, Q)
    _finish(nodes, nodes("Squeeze", read, [1]))


def _spatial_cross_attention(nodes: _Nodes, levels: int) -> None:
    level_hw = nodes.level_hw()
    num_queries, pillar = nodes.size("sampling_offsets", 1), nodes.sizes_from("reference_points", 3)  # Q; D, 2
    offsets = nodes("Reshape", _offsets(nodes, level_hw), nodes.join([0, 1], num_queries, [-1], pillar))  # (B, 1, Q, M*L*P/D, D, 2)
    locations = nodes("Add", nodes("Unsqueeze", "reference_points", [3]), offsets)  # (B, N, Q, M*L*P/D, D, 2)
    locations = nodes("Reshape", locations, nodes.join([-1], nodes.sizes_from("sampling_offsets", 1)))  # (B*N, Q, M, L, P, 2)
    read = _read(nodes, "value", locations, level_hw, levels)  # (B, N, M, C, Q)
    masked = nodes("Mul", read, nodes("Unsqueeze", "visible", [2, 3]))
    total = nodes("ReduceSum", masked, [1], keepdims=0)  # (B, M, C, Q)
    count = nodes("Max", nodes("ReduceSum", "visible", [1], keepdims=0), nodes.scalar(1.0))  # (B, Q)
    _finish(nodes, nodes("Div", total, nodes("Unsqueeze", count, [1, 2])))


def _builtin(nodes: _Nodes, levels: int) -> None:
    value, level_hw = nodes("Unsqueeze", "value", [1]), nodes("Cast", "spatial_shapes", to=TensorProto.INT64)
    read = _weighted_sum(nodes, value, "sampling_locations", "attention_weights", level_hw, levels)  # (B, 1, M, C, Q)
    nodes("Transpose", nodes("Squeeze", read, [1]), perm=[0, 3, 1, 2], output=_OUTPUT)  # (B, Q, M, C)


def _modulated_deformable_im2col(nodes: _Nodes, _: int) -> None:
    out_hw = nodes.size("offsets", 2, 4)  # h, w
    shift = nodes("Reshape", "offsets", nodes.join([0, 9, 2], out_hw))  # (B, 9, 2, h, w)
    stride = nodes("Cast", nodes.attribute("stride", AttributeProto.INT), to=TensorProto.FLOAT)
    grid = [_positions(nodes, shift, stride, axis) for axis in (1, 0)]  # x, then y; (B, 9, h, w) each
    grid = nodes("Concat", *(nodes("Unsqueeze", g, [4]) for g in grid), axis=4)  # (B, 9, h, w, 2)
    grid = nodes("Reshape", grid, nodes.join([0, -1], nodes.size(shift, 4), [2]))  # (B, 9*h, w, 2)
    read = nodes("GridSample", "x", grid, mode="bilinear", padding_mode="zeros", align_corners=0)  # (B, C, 9*h, w)
    read = nodes("Reshape", read, nodes.join([0, 0, 9], out_hw))  # (B, C, 9, h, w)
    masked = nodes("Mul", read, nodes("Unsqueeze", "mask", [1]))
    nodes("Reshape", masked, nodes.join([0, -1], out_hw), output=_OUTPUT)  # (B, C*9, h, w)


def _positions(nodes: _Nodes, shift: str, stride: str, axis: int) -> str:
    """(B, 9, h, w) rows (axis 0) or columns (axis 1) that the taps read, in -1..1 of the input."""
    taps = [float(tap // 3 - 1 if axis == 0 else tap % 3 - 1) for tap in range(9)]
    taps = nodes("Unsqueeze", nodes.floats(taps), [1, 2])  # (9, 1, 1)
    start, end = nodes("Constant", value_int=0), nodes("Squeeze", nodes.size(shift, 3 + axis))
    steps = nodes("Cast", nodes("Range", start, end, nodes("Constant", value_int=1)), to=TensorProto.FLOAT)  # (h,) or (w,)
    place = nodes("Unsqueeze", nodes("Mul", steps, stride), [1 - axis])  # (h, 1) or (1, w)
    pixels = nodes("Add", nodes.level(shift, axis, axis=2), nodes("Add", place, taps))  # (B, 9, h, w)
    size = nodes("Cast", nodes.size("x", 2 + axis), to=TensorProto.FLOAT)
    doubled = nodes("Add", nodes("Mul", pixels, nodes.scalar(2.0)), nodes.scalar(1.0))
    return nodes("Sub", nodes("Div", doubled, size), nodes.scalar(1.0))


_BODIES: dict[str, Callable[[_Nodes, int], None]] = {
    MSDA: _multi_scale_deformable_attention,
    SCA: _spatial_cross_attention,
    IM2COL: _modulated_deformable_im2col,
    BUILTIN: _builtin,
}
_BODIES |= {integer: _BODIES[op_type] for op_type, integer in INTEGER_VALUE.items()}


def _offsets(nodes: _Nodes, level_hw: str) -> str:
    """Sampling offsets (B, Q, M, L, P, 2) in 0..1 of their level instead of cells."""
    level_wh = nodes("Cast", nodes("Gather", level_hw, [1, 0], axis=1), to=TensorProto.FLOAT)  # (L, 2)
    return nodes("Div", "sampling_offsets", nodes("Unsqueeze", level_wh, [1]))


def _read(nodes: _Nodes, value: str, locations: str, level_hw: str, levels: int) -> str:
    """Read value (B, N, S, M, C) at locations (B*N, Q, M, L, P, 2) and sum with the softmaxed logits: (B, N, M, C, Q)."""
    flat = nodes("Softmax", nodes("Reshape", "attention_logits", [0, 0, 0, -1]), axis=-1)  # (B, Q, M, L*P)
    weights = nodes("Reshape", flat, nodes.sizes_from("attention_logits", 0))
    return _weighted_sum(nodes, value, locations, weights, level_hw, levels)


def _weighted_sum(nodes: _Nodes, value: str, locations: str, weights: str, level_hw: str, levels: int) -> str:
    """The same with weights (B, Q, M, L, P)."""
    weights = nodes("Transpose", weights, perm=[0, 2, 1, 3, 4])  # (B, M, Q, L, P)
    grid = nodes("Sub", nodes("Mul", locations, nodes.scalar(2.0)), nodes.scalar(1.0))
    grid = nodes("Transpose", grid, perm=[0, 2, 1, 3, 4, 5])  # (B*N, M, Q, L, P, 2)
    images = nodes("Transpose", value, perm=[0, 1, 3, 4, 2])  # (B, N, M, C, S)
    if nodes.integer_value:
        images = _dequantized(nodes, images)
    channels, cameras = nodes.size(images, 3), nodes.size(images, 0, 3)  # C; B, N, M
    start, total = nodes.constant([0]), ""
    for index in range(levels):
        hw = nodes.level(level_hw, index, axis=0)  # h, w
        end = nodes("Add", start, nodes("ReduceProd", hw, keepdims=1))
        image = nodes("Reshape", nodes("Slice", images, start, end, [4]), nodes.join([-1], channels, hw))  # (B*N*M, C, h, w)
        points = nodes.level(grid, index, axis=3)  # (B*N, M, Q, P, 2)
        points = nodes("Reshape", points, nodes.join([-1], nodes.sizes_from(points, 2)))  # (B*N*M, Q, P, 2)
        sample = nodes("GridSample", image, points, mode="bilinear", padding_mode="zeros", align_corners=0)  # (B*N*M, C, Q, P)
        sample = nodes("Reshape", sample, nodes.join(cameras, nodes.sizes_from(sample, 1)))  # (B, N, M, C, Q, P)
        share = nodes("Unsqueeze", nodes.level(weights, index, axis=3), [1, 3])  # (B, 1, M, 1, Q, P)
        level_sum = nodes("ReduceSum", nodes("Mul", sample, share), [5], keepdims=0)  # (B, N, M, C, Q)
        total = nodes("Add", total, level_sum) if total else level_sum
        start = end
    return total


def _dequantized(nodes: _Nodes, integers: str) -> str:
    """int8 times `value_scale`, in float32.

    Not by a DequantizeLinear: parsers call that layer after the node and refuse the second body of one model (seen in TensorRT-RTX 1.7.1,
    which makes the same two operations of it). Moved as integers first, it costs no kernel more than a DequantizeLinear before.
    """
    scale = nodes("Cast", "value_scale", to=TensorProto.FLOAT)
    return nodes("Mul", nodes("Cast", integers, to=TensorProto.FLOAT), scale)


def _finish(nodes: _Nodes, read: str) -> None:
    """(B, M, C, Q) to the output (B, Q, M*C)."""
    nodes("Reshape", nodes("Transpose", read, perm=[0, 3, 1, 2]), [0, 0, -1], output=_OUTPUT)
