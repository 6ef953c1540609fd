"""ONNX bodies of MultiScaleDeformableAttention, SpatialCrossAttention and their int8 forms (contracts: qdbev/ops/msda.py and sca.py).

All shape arithmetic starts at Shape nodes, which fold to constants because the deployed graph has static shapes. TensorRT-RTX (1.7.1)
makes one kernel of sampling and summing only if the sum has at most four terms and is the last operation. Points are therefore sampled
four at a time, and axes are exchanged before the last sum; otherwise every sample would be written to memory.

B batch, N cameras, S keys of all levels, M heads, C channels of a head, Q queries, L levels, P points of a level, D points of a pillar.
"""

import onnx_ir as ir

from export.bodies.nodes import BodyNodes, Inputs

_POINTS_AT_ONCE = 4
"""Points of a level that one GridSample reads."""


def msda(nodes: BodyNodes, inputs: Inputs) -> ir.Value:
    """Create the nodes of MultiScaleDeformableAttention and return the output (B, Q, M*C)."""
    level_hw = _level_hw(nodes)
    reference = nodes("Unsqueeze", inputs["reference_points"], [2, 3, 4])  # (B, Q, 1, 1, 1, 2)
    locations = nodes("Add", reference, _normalised_offsets(nodes, inputs, level_hw))  # (B, Q, M, L, P, 2)
    weights = _attention_weights(nodes, inputs)
    value = nodes("Unsqueeze", inputs["value"], [1])
    samples = _weighted_samples(nodes, value, inputs.get("value_scale"), locations, weights, level_hw)
    samples = [nodes("Transpose", sample, perm=[0, 1, 4, 2, 3, 5]) for sample in samples]  # (B, 1, Q, M, C, P)
    read = nodes("Squeeze", _sum_points(nodes, samples), [1])  # (B, Q, M, C)
    return nodes("Reshape", read, [0, 0, -1])


def sca(nodes: BodyNodes, inputs: Inputs) -> ir.Value:
    """Create the nodes of SpatialCrossAttention and return the output (B, Q, M*C).

    Every camera is sampled for every query and masked afterwards, so that shapes stay static, which TensorRT needs.
    """
    level_hw = _level_hw(nodes)
    num_query, pillar = nodes.size(inputs["sampling_offsets"], 1), nodes.sizes_from(inputs["reference_points"], 3)  # Q; D, 2
    offsets = _normalised_offsets(nodes, inputs, level_hw)
    offsets = nodes("Reshape", offsets, nodes.join([0, 1], num_query, [-1], pillar))  # (B, 1, Q, M*L*P/D, D, 2)
    locations = nodes("Add", nodes("Unsqueeze", inputs["reference_points"], [3]), offsets)  # (B, N, Q, M*L*P/D, D, 2)
    shape = nodes.join([-1], nodes.sizes_from(inputs["sampling_offsets"], 1))
    locations = nodes("Reshape", locations, shape)  # (B*N, Q, M, L, P, 2)
    weights = _attention_weights(nodes, inputs)
    samples = _weighted_samples(nodes, inputs["value"], inputs.get("value_scale"), locations, weights, level_hw)
    read = _sum_points(nodes, samples)  # (B, N, M, C, Q)
    read = nodes("Transpose", read, perm=[0, 1, 4, 2, 3])  # (B, N, Q, M, C)
    count = nodes("Max", nodes("ReduceSum", inputs["visible"], [1], keepdims=1), nodes.scalar(1.0))  # (B, 1, Q)
    share = nodes("Unsqueeze", nodes("Div", inputs["visible"], count), [3, 4])  # (B, N, Q, 1, 1)
    mean = nodes("ReduceSum", nodes("Mul", read, share), [1], keepdims=0)  # (B, Q, M, C)
    return nodes("Reshape", mean, [0, 0, -1])


def _level_hw(nodes: BodyNodes) -> ir.Value:
    """(L, 2) int64 heights and widths from the attribute `level_hw`."""
    return nodes("Reshape", nodes.attribute("level_hw", ir.AttributeType.INTS), [-1, 2])


def _normalised_offsets(nodes: BodyNodes, inputs: Inputs, level_hw: ir.Value) -> ir.Value:
    """(B, Q, M, L, P, 2) sampling offsets as fractions of their level, from offsets in cells."""
    level_wh = nodes("Cast", nodes("Gather", level_hw, [1, 0], axis=1), to=ir.DataType.FLOAT)  # (L, 2)
    return nodes("Div", inputs["sampling_offsets"], nodes("Unsqueeze", level_wh, [1]))


def _attention_weights(nodes: BodyNodes, inputs: Inputs) -> ir.Value:
    """(B, Q, M, L, P) softmax over levels and points together."""
    logits = inputs["attention_logits"]
    flat = nodes("Softmax", nodes("Reshape", logits, [0, 0, 0, -1]), axis=-1)  # (B, Q, M, L*P)
    return nodes("Reshape", flat, nodes.sizes_from(logits, 0))


def _weighted_samples(
    nodes: BodyNodes, value: ir.Value, value_scale: ir.Value | None, locations: ir.Value, weights: ir.Value, level_hw: ir.Value
) -> list[ir.Value]:
    """Samples of value (B, N, S, M, C) at locations (B*N, Q, M, L, P, 2) in 0..1, times weights (B, Q, M, L, P).

    `value_scale` () is the step of an int8 value, None for a float value. Every entry of the result (B, N, M, C, Q, at most 4) holds some
    points of one level.
    """
    weights = nodes("Transpose", weights, perm=[0, 2, 1, 3, 4])  # (B, M, Q, L, P)
    grid = nodes("Sub", nodes("Mul", locations, nodes.scalar(2.0)), nodes.scalar(1.0))
    grid = nodes("Transpose", grid, perm=[0, 2, 1, 3, 4, 5])  # (B*N, M, Q, L, P, 2)
    images = nodes("Transpose", value, perm=[0, 1, 3, 4, 2])  # (B, N, M, C, S)
    channels, cameras = nodes.size(images, 3), nodes.size(images, 0, 3)  # C; B, N, M
    start, parts = nodes.integers([0]), []
    for level in range(nodes.sizes.levels):
        hw = nodes.select(level_hw, level, axis=0)  # h, w
        end = nodes("Add", start, nodes("ReduceProd", hw, keepdims=1))
        image = nodes("Reshape", nodes("Slice", images, start, end, [4]), nodes.join([-1], channels, hw))  # (B*N*M, C, h, w)
        if value_scale is not None:
            # Only here, so that the Transpose and Slice before move one byte per element. A DequantizeLinear would do the same, but parsers
            # call that layer after its node and refuse the second body of one model (seen in TensorRT-RTX 1.7.1).
            scale = nodes("Cast", value_scale, to=ir.DataType.FLOAT)
            image = nodes("Mul", nodes("Cast", image, to=ir.DataType.FLOAT), scale)
        points = nodes.select(grid, level, axis=3)  # (B*N, M, Q, P, 2)
        points = nodes("Reshape", points, nodes.join([-1], nodes.sizes_from(points, 2)))  # (B*N*M, Q, P, 2)
        shares = nodes("Unsqueeze", nodes.select(weights, level, axis=3), [1, 3])  # (B, 1, M, 1, Q, P)
        for first in range(0, nodes.sizes.points, _POINTS_AT_ONCE):
            last = [first + _POINTS_AT_ONCE]
            some = nodes("Slice", points, [first], last, [2])
            sample = nodes("GridSample", image, some, mode="bilinear", padding_mode="zeros", align_corners=0)  # (B*N*M, C, Q, P)
            sample = nodes("Reshape", sample, nodes.join(cameras, nodes.sizes_from(sample, 1)))  # (B, N, M, C, Q, P)
            parts.append(nodes("Mul", sample, nodes("Slice", shares, [first], last, [5])))
        start = end
    return parts


def _sum_points(nodes: BodyNodes, parts: list[ir.Value]) -> ir.Value:
    """Sum over the last axis of all parts together."""
    total, *others = [nodes("ReduceSum", part, [-1], keepdims=0) for part in parts]
    for other in others:
        total = nodes("Add", total, other)
    return total
