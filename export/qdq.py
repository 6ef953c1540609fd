"""Quantized graphs in the form engines want: int8 weights behind DequantizeLinear, and the 4-bit form for storage.

The exporter leaves float weights on their grid, QuantizeLinear, DequantizeLinear and, for linear layers, Transpose. Engines want

    x -> [Clip] -> QuantizeLinear -> DequantizeLinear -> MatMul(DequantizeLinear(int8 W (in, out), axis 1)) + bias

and the same with Conv, whose weight keeps its layout (axis 0). Biases and residual additions stay float.
"""

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graph import Graph, declare_opset, integers
from qdbev import schema

_STORAGE_OPSET = 21
"""The first operator set with INT4 tensors in DequantizeLinear."""
_INT4_MAX = 7
_COMMUTE = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
_GRID_SAMPLE_MODES = {b"bilinear": b"linear"}
"""GridSample's mode was renamed in operator set 20."""


def pack_weights(model: onnx.ModelProto) -> int:
    """Turn every float weight followed by QuantizeLinear into an int8 constant, in place, and return their number.

    Raises:
        ValueError: A weight does not lie on its grid, so that packing would change the network.
    """
    graph = Graph(model)
    weights = [node for node in graph.proto.node if node.op_type == "QuantizeLinear" and node.input[0] in graph.initializers]
    readers = graph.readers()
    for quantize in weights:
        integer = _integers_of(graph, quantize)
        for dequantize in readers[quantize.output[0]]:
            _pack(graph, dequantize, quantize.input[0], integer, readers[dequantize.output[0]])
    graph.prune()
    return len(weights)


def clip_early(model: onnx.ModelProto) -> int:
    """Clip what is pooled or only moved before that instead of after it, in place, and return the number of exchanges.

    The values are the same, as a clip commutes with a maximum and with any move. Engines then fuse the Clip into the kernel before, and
    pool and move integers, as they do at 8 bits, where there is no Clip.
    """
    graph = Graph(model)
    readers = graph.readers()
    moved = []
    for node in graph.proto.node:
        clip = node
        while clip.op_type == "Clip" and (move := graph.producers.get(clip.input[0])) is not None:
            between = move.output[0]
            if move.op_type not in _COMMUTE or len(readers[between]) > 1 or between in graph.outputs:
                break
            _exchange(move, clip)
            clip = move
            moved.append(between)
    graph.forget(moved)
    return len(moved)


def pack_int4(model: onnx.ModelProto) -> onnx.ModelProto:
    """The storage form: a copy whose int8 weights between -7 and 7 are INT4 tensors, two values a byte.

    No TensorRT builds convolutions from it. `unpack_int4` gives back the model it was made of, and `to_onnx.arrange` the deployed one.
    """
    packed = _copy(model)
    weights = _weight_names(packed)
    for tensor in packed.graph.initializer:
        if tensor.name not in weights or tensor.data_type != TensorProto.INT8:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values.astype(np.int16)).max(initial=0) <= _INT4_MAX:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(ml_dtypes.int4), tensor.name))
    _set_opset(packed, _STORAGE_OPSET, _GRID_SAMPLE_MODES)
    return packed


def unpack_int4(model: onnx.ModelProto) -> onnx.ModelProto:
    """Inverse of `pack_int4`."""
    unpacked = _copy(model)
    for tensor in unpacked.graph.initializer:
        if tensor.data_type == TensorProto.INT4:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int8), tensor.name))
    _set_opset(unpacked, schema.OPSET, {new: old for old, new in _GRID_SAMPLE_MODES.items()})
    return unpacked


def _exchange(first: NodeProto, second: NodeProto) -> None:
    """Let `second`, the only reader of `first`, come before it; tensor names between and around them stay."""
    source, between, result = first.input[0], first.output[0], second.output[0]
    was_first = NodeProto()
    was_first.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(was_first)
    first.input[0], first.output[0] = source, between
    second.input[0], second.output[0] = between, result


def _integers_of(graph: Graph, quantize: NodeProto) -> np.ndarray:
    """The int8 values of a weight that lies on its grid."""
    name = quantize.input[0]
    weight, scale = graph.constant(name), graph.constant(quantize.input[1])
    if scale is None:
        raise ValueError(f"weight {name} is quantized with a computed scale; trace the model inside qdbev.quant.export.exporting")
    step = scale if scale.ndim == 0 else scale.reshape([-1 if axis == integers(quantize, "axis", 1) else 1 for axis in range(weight.ndim)])
    steps = weight / step
    integer = np.clip(np.rint(steps), -127, 127)
    error = float(np.abs(steps - integer).max(initial=0))
    if not error < 1e-3:
        raise ValueError(f"weight {name} lies up to {error:.3g} steps off its grid; trace the model inside qdbev.quant.export.exporting")
    return integer.astype(np.int8)


def _pack(graph: Graph, dequantize: NodeProto, name: str, integer: np.ndarray, readers: list[NodeProto]) -> None:
    """Give one DequantizeLinear the integers themselves; Transposes that read it move into the constant."""
    axis = integers(dequantize, "axis", 1)
    scale = graph.add_constant(f"{name}.scale", graph.constant(dequantize.input[1]))
    transposes = [node for node in readers if node.op_type == "Transpose"]
    for transpose in transposes:
        perm = integers(transpose, "perm", list(range(integer.ndim))[::-1])
        constant = graph.add_constant(f"{name}.int8", integer.transpose(perm))
        node = helper.make_node("DequantizeLinear", [constant, scale], list(transpose.output), name=dequantize.name, axis=perm.index(axis))
        transpose.CopyFrom(node)
    if len(transposes) < len(readers) or not readers:
        constant = graph.add_constant(f"{name}.int8", integer)
        node = helper.make_node("DequantizeLinear", [constant, scale], list(dequantize.output), name=dequantize.name, axis=axis)
        dequantize.CopyFrom(node)


def _weight_names(model: onnx.ModelProto) -> set[str]:
    return {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}


def _set_opset(model: onnx.ModelProto, version: int, grid_sample_modes: dict[bytes, bytes]) -> None:
    """Declare another operator set in the model and its functions, and rename GridSample's mode."""
    declare_opset(model, version)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            for attribute in node.attribute:
                if node.op_type == "GridSample" and attribute.name == "mode":
                    attribute.s = grid_sample_modes.get(attribute.s, attribute.s)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
