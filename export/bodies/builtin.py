"""ONNX body of TensorRT's own attention plugin, with which onnxruntime can run a graph that calls it (see export/builtin_plugin.py).

Source: plugin/multiscaleDeformableAttnPlugin of NVIDIA/TensorRT at release/8.6. Letters as in sampling.py.
"""

import onnx_ir as ir

from export.bodies import sampling
from export.bodies.nodes import BodyNodes

NAME = "MultiscaleDeformableAttnPlugin_TRT"
"""Name under which TensorRT registers the plugin."""
INPUTS = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
"""Names of its inputs, in order."""


def body(
    nodes: BodyNodes,
    value: ir.Value,
    spatial_shapes: ir.Value,
    level_start_index: ir.Value,  # unused: it follows from spatial_shapes
    sampling_locations: ir.Value,
    attention_weights: ir.Value,
) -> ir.Value:
    """Create the nodes and return the output (B, Q, M, C).

    Shapes: value (B, S, M, C), spatial_shapes (L, 2) int32 heights and widths, level_start_index (L,) int32, sampling_locations
    (B, Q, M, L, P, 2) in 0..1, attention_weights (B, Q, M, L, P) after the softmax.
    """
    level_hw = nodes("Cast", spatial_shapes, to=ir.DataType.INT64)
    read = sampling.sample_one_image(nodes, value, sampling_locations, attention_weights, level_hw)
    return nodes("Identity", read)
