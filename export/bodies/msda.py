"""ONNX body of MultiScaleDeformableAttention and of its int8 form. The contract is in qdbev/ops/msda.py."""

import onnx_ir as ir

from export.bodies import sampling
from export.bodies.nodes import BodyNodes


def body(
    nodes: BodyNodes,
    value: ir.Value,
    reference_points: ir.Value,
    sampling_offsets: ir.Value,
    attention_logits: ir.Value,
    value_scale: ir.Value | None = None,
) -> ir.Value:
    """Create the nodes and return the output (B, Q, M*C)."""
    level_hw = sampling.level_hw_attribute(nodes)
    reference = nodes("Unsqueeze", reference_points, [2, 3, 4])  # (B, Q, 1, 1, 1, 2)
    locations = nodes("Add", reference, sampling.normalised_offsets(nodes, sampling_offsets, level_hw))  # (B, Q, M, L, P, 2)
    weights = sampling.attention_weights(nodes, attention_logits)
    read = sampling.sample_one_image(nodes, value, locations, weights, level_hw, value_scale)  # (B, Q, M, C)
    return nodes("Reshape", read, [0, 0, -1])
