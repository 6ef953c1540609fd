"""ONNX local functions: the bodies of the custom operators, for every runtime that has no kernel of that name.

The contracts are those of qdbev/ops/{msda,sca,deform_conv}.py. Both attentions share one reading core, in which
MultiScaleDeformableAttention is the case of one camera that sees every query. Bodies take `level_hw` and `stride` from the node's
attributes; only the numbers of levels and points are fixed when a body is made.

Every camera is read for every query and masked afterwards: shapes stay static, which is what TensorRT needs. All shape arithmetic
starts at Shape nodes, which fold to constants because the deployed graph has static shapes. TensorRT-RTX (1.7.1) makes one kernel of
reading and summing where a sum has at most four terms and is the last thing done, so points are read four at a time and axes are
exchanged before the last sum; otherwise every sample goes through memory.

B batch, N cameras, S keys of all levels, M heads, C channels a head, Q queries, D pillar points, L levels, P points.
In deformable convolution: C channels, H W the input's size, h w the output's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from export.graph import shapes
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
_TOGETHER = 4
"""Points read together."""


class Sizes(NamedTuple):
    """What a body is made for: levels, and points a level; zero where the operator has none."""

    levels: int = 0
    points: int = 0


def attach(model: onnx.ModelProto) -> None:
    """Give `model` a body for each custom operator it uses, and no other.

    Raises:
        ValueError: A node of the domain is no operator of ours, or one operator is used with different numbers of levels or points.
    """
    sizes: dict[str, set[Sizes]] = {}
    del model.functions[:]
    custom = [node for node in model.graph.node if node.domain == schema.OP_DOMAIN]
    if custom and schema.OP_DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(schema.OP_DOMAIN, schema.OP_VERSION))
    known = shapes(model) if custom else {}
    for node in custom:
        if node.op_type not in _BODIES:
            raise ValueError(f"node {node.name} is a {node.domain}::{node.op_type}; bodies exist for {', '.join(_BODIES)}")
        sizes.setdefault(node.op_type, set()).add(_sizes(node, known))
    for op_type, found in sizes.items():
        if len(found) > 1:
            levels, points = (sorted(set(counts)) for counts in zip(*found, strict=True))
            raise ValueError(f"{op_type} is used with {levels} levels and {points} points; one ONNX function has one number of each")
        model.functions.append(body(op_type, found.pop()))


def _sizes(node: NodeProto, shapes_of: dict[str, tuple[int, ...]]) -> Sizes:
    """Those of a custom node, from the shape of its offsets."""
    offsets = dict(zip(INPUTS[node.op_type], node.input, strict=True)).get("sampling_offsets")
    if offsets is None:
        return Sizes()
    if min(shapes_of.get(offsets, (0,))) < 1:
        raise ValueError(f"the shape of {offsets}, the sampling offsets of node {node.name}, does not follow from the graph")
    levels, points, _ = shapes_of[offsets][-3:]
    return Sizes(levels, points)


def body(op_type: str, sizes: Sizes) -> FunctionProto:
    """The local function of an operator."""
    nodes = _Nodes(sizes, integer_value=op_type in INTEGER_VALUE.values())
    _BODIES[op_type](nodes)
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

    def __init__(self, sizes: Sizes, integer_value: bool) -> None:
        self.list: list[NodeProto] = []
        self.sizes = sizes
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


def _multi_scale_deformable_attention(nodes: _Nodes) -> None:
    level_hw = nodes.level_hw()
    reference = nodes("Unsqueeze", "reference_points", [2, 3, 4])  # (B, Q, 1, 1, 1, 2)
    locations = nodes("Add", reference, _offsets(nodes, level_hw))  # (B, Q, M, L, P, 2)
    read = _read_one_image(nodes, locations, _softmax(nodes), level_hw)
    nodes("Reshape", read, [0, 0, -1], output=_OUTPUT)


def _spatial_cross_attention(nodes: _Nodes) -> None:
    level_hw = nodes.level_hw()
    num_queries, pillar = nodes.size("sampling_offsets", 1), nodes.sizes_from("reference_points", 3)  # Q; D, 2
    offsets = nodes("Reshape", _offsets(nodes, level_hw), nodes.join([0, 1], num_queries, [-1], pillar))  # (B, 1, Q, M*L*P/D, D, 2)
    locations = nodes("Add", nodes("Unsqueeze", "reference_points", [3]), offsets)  # (B, N, Q, M*L*P/D, D, 2)
    locations = nodes("Reshape", locations, nodes.join([-1], nodes.sizes_from("sampling_offsets", 1)))  # (B*N, Q, M, L, P, 2)
    read = _sum(nodes, _samples(nodes, "value", locations, _softmax(nodes), level_hw))  # (B, N, M, C, Q)
    read = nodes("Transpose", read, perm=[0, 1, 4, 2, 3])  # (B, N, Q, M, C)
    count = nodes("Max", nodes("ReduceSum", "visible", [1], keepdims=1), nodes.scalar(1.0))  # (B, 1, Q)
    share = nodes("Unsqueeze", nodes("Div", "visible", count), [3, 4])  # (B, N, Q, 1, 1)
    mean = nodes("ReduceSum", nodes("Mul", read, share), [1], keepdims=0)  # (B, Q, M, C)
    nodes("Reshape", mean, [0, 0, -1], output=_OUTPUT)


def _builtin(nodes: _Nodes) -> None:
    level_hw = nodes("Cast", "spatial_shapes", to=TensorProto.INT64)
    read = _read_one_image(nodes, "sampling_locations", "attention_weights", level_hw)
    nodes("Identity", read, output=_OUTPUT)


def _modulated_deformable_im2col(nodes: _Nodes) -> None:
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


_BODIES: dict[str, Callable[[_Nodes], None]] = {
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


def _softmax(nodes: _Nodes) -> str:
    """The logits' softmax over levels and points together, in their shape (B, Q, M, L, P)."""
    flat = nodes("Softmax", nodes("Reshape", "attention_logits", [0, 0, 0, -1]), axis=-1)  # (B, Q, M, L*P)
    return nodes("Reshape", flat, nodes.sizes_from("attention_logits", 0))


def _read_one_image(nodes: _Nodes, locations: str, weights: str, level_hw: str) -> str:
    """`value` (B, S, M, C) read at locations (B, Q, M, L, P, 2) and summed with weights (B, Q, M, L, P): (B, Q, M, C)."""
    samples = _samples(nodes, nodes("Unsqueeze", "value", [1]), locations, weights, level_hw)
    samples = [nodes("Transpose", sample, perm=[0, 1, 4, 2, 3, 5]) for sample in samples]  # (B, 1, Q, M, C, P)
    return nodes("Squeeze", _sum(nodes, samples), [1])


def _samples(nodes: _Nodes, value: str, locations: str, weights: str, level_hw: str) -> list[str]:
    """What is read of value (B, N, S, M, C) at locations (B*N, Q, M, L, P, 2), times weights (B, Q, M, L, P).

    A part for some points of each level: (B, N, M, C, Q, at most `_TOGETHER`).
    """
    weights = nodes("Transpose", weights, perm=[0, 2, 1, 3, 4])  # (B, M, Q, L, P)
    grid = nodes("Sub", nodes("Mul", locations, nodes.scalar(2.0)), nodes.scalar(1.0))
    grid = nodes("Transpose", grid, perm=[0, 2, 1, 3, 4, 5])  # (B*N, M, Q, L, P, 2)
    images = nodes("Transpose", value, perm=[0, 1, 3, 4, 2])  # (B, N, M, C, S)
    channels, cameras = nodes.size(images, 3), nodes.size(images, 0, 3)  # C; B, N, M
    start, parts = nodes.constant([0]), []
    for index in range(nodes.sizes.levels):
        hw = nodes.level(level_hw, index, axis=0)  # h, w
        end = nodes("Add", start, nodes("ReduceProd", hw, keepdims=1))
        image = nodes("Reshape", nodes("Slice", images, start, end, [4]), nodes.join([-1], channels, hw))  # (B*N*M, C, h, w)
        if nodes.integer_value:
            image = _dequantized(nodes, image)
        points = nodes.level(grid, index, axis=3)  # (B*N, M, Q, P, 2)
        points = nodes("Reshape", points, nodes.join([-1], nodes.sizes_from(points, 2)))  # (B*N*M, Q, P, 2)
        shares = nodes("Unsqueeze", nodes.level(weights, index, axis=3), [1, 3])  # (B, 1, M, 1, Q, P)
        for first in range(0, nodes.sizes.points, _TOGETHER):
            last = [first + _TOGETHER]
            some = nodes("Slice", points, [first], last, [2])
            sample = nodes("GridSample", image, some, mode="bilinear", padding_mode="zeros", align_corners=0)  # (B*N*M, C, Q, P)
            sample = nodes("Reshape", sample, nodes.join(cameras, nodes.sizes_from(sample, 1)))  # (B, N, M, C, Q, P)
            parts.append(nodes("Mul", sample, nodes("Slice", shares, [first], last, [5])))
        start = end
    return parts


def _sum(nodes: _Nodes, parts: list[str]) -> str:
    """Sum of the last axis of all parts."""
    total, *others = [nodes("ReduceSum", part, [-1], keepdims=0) for part in parts]
    for other in others:
        total = nodes("Add", total, other)
    return total


def _dequantized(nodes: _Nodes, integers: str) -> str:
    """int8 times `value_scale`, in float32.

    Not by a DequantizeLinear: parsers call that layer after the node and refuse the second body of one model (seen in TensorRT-RTX 1.7.1,
    which makes the same two operations of it). Moved as integers until here, it costs that no kernel more than a DequantizeLinear before.
    """
    scale = nodes("Cast", "value_scale", to=TensorProto.FLOAT)
    return nodes("Mul", nodes("Cast", integers, to=TensorProto.FLOAT), scale)
