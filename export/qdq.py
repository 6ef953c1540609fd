"""Quantized graphs in the form that engines need: int8 weights behind DequantizeLinear; and the 4-bit form for storage.

The exporter writes float weights on their quantization grid, QuantizeLinear, DequantizeLinear and, for linear layers, Transpose. Engines
need

    x -> [Clip] -> QuantizeLinear -> DequantizeLinear -> MatMul(DequantizeLinear(int8 W (in, out), axis 1)) + bias

and the same with Conv, whose weight keeps its layout (axis 0). Biases and residual additions stay float.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export.graph import PassError, add_constant, before_reordering, constant, declare_opset, remove_unused
from qdbev.ops import contract

_STORAGE_OPSET = 21
"""The first operator set with INT4 tensors in DequantizeLinear."""
_DEFAULT_AXIS = 1
"""Axis of the scales of a QuantizeLinear or DequantizeLinear without the attribute."""
_INT4_MAX = 7
"""Largest magnitude of a stored 4-bit weight."""
_COMMUTE = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
"""Operators that give the same values whether a Clip comes before or after them."""
_GRID_SAMPLE_MODES = {"bilinear": "linear"}
"""GridSample's mode was renamed in operator set 20."""


def pack_weights(model: ir.Model) -> int:
    """Turn every float weight that is followed by QuantizeLinear into an int8 constant, and return the number of packed weights.

    Raises:
        ValueError: A weight is not on its grid, so that packing would change the network.
        PassError: The weight of a quantized layer is left as floats.
    """
    quantizes = [node for node in model.graph if node.op_type == "QuantizeLinear" and node.inputs[0].is_initializer()]
    for quantize in quantizes:
        integers = _integers_of(quantize)
        for dequantize in quantize.outputs[0].consumers():
            _pack(dequantize, quantize.inputs[0].name, integers)
    remove_unused(model)
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and len(node.inputs[1].shape) and before_reordering(node.inputs[0]).is_initializer():
            raise PassError(
                f"pack_weights: the weight of {node.name} stays float; the pass looks for QuantizeLinear directly after a weight"
            )
    return len(quantizes)


def clip_early(model: ir.Model) -> int:
    """Move every Clip before the pooling and the moves of its input, and return the number of exchanges.

    The values are the same, because a clip commutes with a maximum and with any move. Engines then fuse the Clip into the kernel before it,
    and pool and move integers, as they do at 8 bits, where there is no Clip.
    """
    exchanges = 0
    for clip in [node for node in model.graph if node.op_type == "Clip"]:
        while (move := clip.inputs[0].producer()) is not None and move.op_type in _COMMUTE:
            between = move.outputs[0]
            if len(between.uses()) > 1 or between.is_graph_output():
                break
            _exchange(move, clip)
            exchanges += 1
    return exchanges


def pack_int4(model: ir.Model) -> ir.Model:
    """The storage form: a copy whose int8 weights between -7 and 7 are INT4 tensors, two values a byte.

    TensorRT cannot build convolutions from it. `unpack_int4` restores the model, and `to_onnx.optimize` makes the deployed one of that.
    """
    packed = model.clone()
    weights = {node.inputs[0] for node in packed.graph if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()}
    for value in weights:
        integers = constant(value)
        if integers.dtype == np.int8 and np.abs(integers.astype(np.int16)).max(initial=0) <= _INT4_MAX:
            _store(value, integers.astype(ml_dtypes.int4))
    _set_opset(packed, _STORAGE_OPSET, _GRID_SAMPLE_MODES)
    return packed


def unpack_int4(model: ir.Model) -> ir.Model:
    """The inverse of `pack_int4`."""
    unpacked = model.clone()
    for value in unpacked.graph.initializers.values():
        if value.const_value.dtype == ir.DataType.INT4:
            _store(value, constant(value).astype(np.int8))
    _set_opset(unpacked, contract.OPSET, {new: old for old, new in _GRID_SAMPLE_MODES.items()})
    return unpacked


def _exchange(move: ir.Node, clip: ir.Node) -> None:
    """Put `clip`, the only reader of `move`, before it. The values around them keep their names."""
    moved, clipped = move.outputs[0], clip.outputs[0]
    clipped.replace_all_uses_with(moved, replace_graph_outputs=True)
    clip.replace_input_with(0, move.inputs[0])
    move.replace_input_with(0, clipped)
    moved.name, clipped.name = clipped.name, moved.name
    moved.type, moved.shape = clipped.type, clipped.shape
    clipped.type, clipped.shape = clip.inputs[0].type, clip.inputs[0].shape
    graph = move.graph
    graph.remove(clip)
    graph.insert_before(move, clip)


def _integers_of(quantize: ir.Node) -> np.ndarray:
    """The int8 values of a weight that is on its grid."""
    name, weight, scale = quantize.inputs[0].name, constant(quantize.inputs[0]), constant(quantize.inputs[1])
    if scale is None:
        raise ValueError(f"weight {name} is quantized with a computed scale; trace the model inside qdbev.quant.export.exporting")
    axis = quantize.attributes.get_int("axis", _DEFAULT_AXIS)
    step = scale if scale.ndim == 0 else scale.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
    steps = weight / step
    integers = np.clip(np.rint(steps), -127, 127)
    error = float(np.abs(steps - integers).max(initial=0))
    if not error < 1e-3:
        raise ValueError(f"weight {name} is up to {error:.3g} steps off its grid; trace the model inside qdbev.quant.export.exporting")
    return integers.astype(np.int8)


def _pack(dequantize: ir.Node, name: str, integers: np.ndarray) -> None:
    """Let one DequantizeLinear read the integers themselves. Transposes that read it become part of the constant."""
    graph, axis = dequantize.graph, dequantize.attributes.get_int("axis", _DEFAULT_AXIS)
    scale = add_constant(graph, f"{name}.scale", constant(dequantize.inputs[1]))
    readers = dequantize.outputs[0].consumers()
    transposes = [node for node in readers if node.op_type == "Transpose"]
    for transpose in transposes:
        perm = list(transpose.attributes.get_ints("perm", range(integers.ndim)[::-1]))
        _become_dequantize(transpose, add_constant(graph, f"{name}.int8", integers.transpose(perm)), scale, perm.index(axis))
        transpose.name = dequantize.name
    if len(transposes) < len(readers) or not readers:
        _become_dequantize(dequantize, add_constant(graph, f"{name}.int8", integers), scale, axis)


def _become_dequantize(node: ir.Node, integers: ir.Value, scale: ir.Value, axis: int) -> None:
    node.op_type = "DequantizeLinear"
    node.resize_inputs(2)
    node.replace_input_with(0, integers)
    node.replace_input_with(1, scale)
    node.attributes.clear()
    node.attributes["axis"] = ir.AttrInt64("axis", axis)


def _store(value: ir.Value, array: np.ndarray) -> None:
    """Replace the content of a constant."""
    value.const_value = ir.tensor(array, name=value.name)
    value.type = ir.TensorType(value.const_value.dtype)  # a new object, because copies of a graph share theirs


def _set_opset(model: ir.Model, version: int, grid_sample_modes: dict[str, str]) -> None:
    """Declare another operator set in the model and its functions, and rename GridSample's mode."""
    declare_opset(model, version)
    for nodes in (model.graph, *model.functions.values()):
        for node in nodes:
            if node.op_type == "GridSample":
                mode = node.attributes["mode"].as_string()
                node.attributes["mode"] = ir.AttrString("mode", grid_sample_modes.get(mode, mode))
