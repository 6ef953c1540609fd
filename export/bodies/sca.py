"""ONNX body of SpatialCrossAttention and of its int8 form. The contract is in qdbev/ops/sca.py.

Every camera is sampled for every query and masked afterwards, so that shapes stay static, which TensorRT needs.
D points of a pillar; the other letters as in sampling.py.
"""

import onnx_ir as ir

from export.bodies import sampling
from export.bodies.nodes import BodyNodes


def body(
    nodes: BodyNodes,
    value: ir.Value,
    reference_points: ir.Value,
    visible: ir.Value,
    sampling_offsets: ir.Value,
    attention_logits: ir.Value,
    value_scale: ir.Value | None = None,
) -> ir.Value:
    """Create the nodes and return the output (B, Q, M*C)."""
    level_hw = sampling.level_hw_attribute(nodes)
    num_query, pillar = nodes.size(sampling_offsets, 1), nodes.sizes_from(reference_points, 3)  # Q; D, 2
    offsets = sampling.normalised_offsets(nodes, sampling_offsets, level_hw)
    offsets = nodes("Reshape", offsets, nodes.join([0, 1], num_query, [-1], pillar))  # (B, 1, Q, M*L*P/D, D, 2)
    locations = nodes("Add", nodes("Unsqueeze", reference_points, [3]), offsets)  # (B, N, Q, M*L*P/D, D, 2)
    locations = nodes("Reshape", locations, nodes.join([-1], nodes.sizes_from(sampling_offsets, 1)))  # (B*N, Q, M, L, P, 2)
    weights = sampling.attention_weights(nodes, attention_logits)
    samples = sampling.weighted_samples(nodes, value, locations, weights, level_hw, value_scale)
    read = sampling.sum_points(nodes, samples)  # (B, N, M, C, Q)
    read = nodes("Transpose", read, perm=[0, 1, 4, 2, 3])  # (B, N, Q, M, C)
    count = nodes("Max", nodes("ReduceSum", visible, [1], keepdims=1), nodes.scalar(1.0))  # (B, 1, Q)
    share = nodes("Unsqueeze", nodes("Div", visible, count), [3, 4])  # (B, N, Q, 1, 1)
    mean = nodes("ReduceSum", nodes("Mul", read, share), [1], keepdims=0)  # (B, Q, M, C)
    return nodes("Reshape", mean, [0, 0, -1])
