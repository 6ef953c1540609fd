"""ONNX body of ModulatedDeformableIm2col. The contract is in qdbev/ops/deform_conv.py.

B batch, C channels, H W size of the input, h w size of the output.
"""

import onnx_ir as ir

from export.bodies.nodes import BodyNodes, Inputs

_TAPS, _SIDE = 9, 3
"""Taps of the 3x3 kernel, and its side."""


def im2col(nodes: BodyNodes, inputs: Inputs) -> ir.Value:
    """Create the nodes and return the output (B, C*9, h, w)."""
    out_hw = nodes.size(inputs["offsets"], 2, 4)  # h, w
    shift = nodes("Reshape", inputs["offsets"], nodes.join([0, _TAPS, 2], out_hw))  # (B, 9, 2, h, w)
    stride = nodes("Cast", nodes.attribute("stride", ir.AttributeType.INT), to=ir.DataType.FLOAT)
    grid = [_positions(nodes, inputs["x"], shift, stride, axis) for axis in (1, 0)]  # x, then y; (B, 9, h, w) each
    grid = nodes("Concat", *(nodes("Unsqueeze", positions, [4]) for positions in grid), axis=4)  # (B, 9, h, w, 2)
    grid = nodes("Reshape", grid, nodes.join([0, -1], nodes.size(shift, 4), [2]))  # (B, 9*h, w, 2)
    read = nodes("GridSample", inputs["x"], grid, mode="bilinear", padding_mode="zeros", align_corners=0)  # (B, C, 9*h, w)
    read = nodes("Reshape", read, nodes.join([0, 0, _TAPS], out_hw))  # (B, C, 9, h, w)
    masked = nodes("Mul", read, nodes("Unsqueeze", inputs["mask"], [1]))
    return nodes("Reshape", masked, nodes.join([0, -1], out_hw))


def _positions(nodes: BodyNodes, x: ir.Value, shift: ir.Value, stride: ir.Value, axis: int) -> ir.Value:
    """(B, 9, h, w) rows (axis 0) or columns (axis 1) at which the taps sample, in -1..1 of the input."""
    taps = [float(divmod(tap, _SIDE)[axis] - 1) for tap in range(_TAPS)]
    taps = nodes("Unsqueeze", nodes("Constant", value_floats=taps), [1, 2])  # (9, 1, 1)
    start, end = nodes.integer(0), nodes("Squeeze", nodes.size(shift, 3 + axis))
    steps = nodes("Cast", nodes("Range", start, end, nodes.integer(1)), to=ir.DataType.FLOAT)  # (h,) or (w,)
    place = nodes("Unsqueeze", nodes("Mul", steps, stride), [1 - axis])  # (h, 1) or (1, w)
    pixels = nodes("Add", nodes.select(shift, axis, axis=2), nodes("Add", place, taps))  # (B, 9, h, w)
    size = nodes("Cast", nodes.size(x, 2 + axis), to=ir.DataType.FLOAT)
    doubled = nodes("Add", nodes("Mul", pixels, nodes.scalar(2.0)), nodes.scalar(1.0))
    return nodes("Sub", nodes("Div", doubled, size), nodes.scalar(1.0))
