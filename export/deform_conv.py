"""Exports deformable convolution as ONNX's own DeformConv instead of a gather and a product: one node, in float only.

onnxruntime and TensorRT 10.1 or newer support DeformConv. TensorRT-RTX does not, and an integer product needs the gather.
Source: ONNX operator DeformConv-19; its offsets have the order of qdbev/ops/deform_conv.py.
"""

import numpy as np
import onnx_ir as ir

from export.graph import add_constant, constant, declare_opset, remove_unused, replace_node
from qdbev.ops import contract
from qdbev.ops.deform_conv import DeformConv2d

OPSET = 19
"""The first operator set with DeformConv."""
_SIDE = 3
"""Side of the kernel."""


def use_standard_node(model: ir.Model) -> int:
    """Replace every gather and the product after it by a DeformConv, and return the number of replacements.

    Raises:
        ValueError: There is no deformable convolution, or its product is quantized, which DeformConv cannot express.
    """
    gathers = [node for node in model.graph if node.op_type == contract.IM2COL.name]
    if not gathers:
        raise ValueError("this model has no deformable convolution; leave --standard-deform-conv out")
    for gather in gathers:
        _fuse(gather)
    remove_unused(model)
    del model.functions[contract.DOMAIN, contract.IM2COL.name, ""]
    declare_opset(model, OPSET)
    return len(gathers)


def _fuse(gather: ir.Node) -> None:
    """Replace the product, a 1x1 Conv over the gathered columns, by the whole convolution."""
    product, *others = gather.outputs[0].consumers()
    weight = constant(product.inputs[1]) if product.op_type == "Conv" and not others else None
    if weight is None:
        raise ValueError(
            f"the product of {gather.name} is not an ordinary float convolution but {product.op_type}; ONNX's DeformConv has no integer "
            "form: leave --standard-deform-conv out for quantized models"
        )
    x, offsets, mask = gather.inputs
    kernel = weight.reshape(weight.shape[0], weight.shape[1] // DeformConv2d.TAPS, _SIDE, _SIDE).astype(np.float32)
    weights = add_constant(product.graph, f"{product.inputs[1].name}.kernel", kernel)
    bias = product.inputs[2] if len(product.inputs) > 2 else None
    stride = gather.attributes["stride"].as_int()
    settings = {"kernel_shape": [_SIDE, _SIDE], "pads": [1, 1, 1, 1], "strides": [stride, stride]}
    node = ir.node("DeformConv", [x, weights, offsets, bias, mask], settings, name=product.name)
    replace_node(product, [node], node.outputs[0])
