"""Deformable convolution as ONNX's own DeformConv instead of gather and product: one node, in float, for runtimes that have it.

onnxruntime and TensorRT 10.1 or newer do; TensorRT-RTX does not, and an integer product needs the other form.
Source: ONNX operator DeformConv-19, whose offsets are laid out as in qdbev/ops/deform_conv.py.
"""

import numpy as np
import onnx
from onnx import NodeProto, helper

from export import functions
from export.graph import Graph, declare_opset, integers
from qdbev.ops.deform_conv import DeformConv2d

OPSET = 19
"""The first operator set with DeformConv."""
_SIDE = 3


def use_standard_node(model: onnx.ModelProto) -> int:
    """Replace every gather and the product behind it by a DeformConv, in place, and return the number of replacements.

    Raises:
        ValueError: There is no deformable convolution, or its product is quantized, which DeformConv cannot express.
    """
    graph = Graph(model)
    readers = graph.readers()
    gathers = [node for node in graph.proto.node if node.op_type == functions.IM2COL]
    if not gathers:
        raise ValueError("this model has no deformable convolution; leave --standard-deform-conv out")
    for gather in gathers:
        _fuse(graph, gather, readers[gather.output[0]])
    graph.prune()
    for function in [function for function in model.functions if function.name == functions.IM2COL]:
        model.functions.remove(function)
    declare_opset(model, OPSET)
    return len(gathers)


def _fuse(graph: Graph, gather: NodeProto, readers: list[NodeProto]) -> None:
    """Make the product, a 1x1 Conv over the gathered columns, the whole convolution."""
    product = readers[0]
    weight = graph.constant(product.input[1]) if product.op_type == "Conv" and len(readers) == 1 else None
    if weight is None:
        raise ValueError(
            f"the product of {gather.name} is not an ordinary float convolution but {product.op_type}; ONNX's DeformConv has no integer "
            "form: leave --standard-deform-conv out for quantized models"
        )
    x, offsets, mask = gather.input
    kernel = weight.reshape(weight.shape[0], weight.shape[1] // DeformConv2d.TAPS, _SIDE, _SIDE).astype(np.float32)
    name = graph.add_constant(f"{product.input[1]}.kernel", kernel)
    bias = product.input[2] if len(product.input) > 2 else ""
    stride = integers(gather, "stride", 1)
    node = helper.make_node(
        "DeformConv",
        [x, name, offsets, bias, mask],
        list(product.output),
        name=product.name,
        kernel_shape=[_SIDE, _SIDE],
        pads=[1, 1, 1, 1],
        strides=[stride, stride],
    )
    product.CopyFrom(node)
