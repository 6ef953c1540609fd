"""Passes that prepare quantized graphs for engines."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnx_passes import apply

from export import qdq
from export.graph import PassError
from qdbev.ops import contract


def clipped_late(outputs):
    """A graph of pooling, a Transpose or the like, and then a Clip."""
    shape = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2, 8, 8])
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name, size in outputs.items()]
    bounds = [numpy_helper.from_array(np.float32(value), name) for name, value in (("low", -0.5), ("high", 0.7))]
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], name="pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["p"], ["t"], name="move", perm=[0, 2, 3, 1]),
        helper.make_node("Clip", ["t", "low", "high"], ["y"], name="clip"),
    ]
    infos = [helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, [1, 2, 4, 4])]
    graph = helper.make_graph(nodes, "g", [shape], results, bounds, value_info=infos)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", contract.OPSET)], ir_version=9)


def test_a_clip_comes_before_pooling_and_moves_and_the_values_stay():
    model = clipped_late({"y": [1, 4, 4, 2]})
    x = {"x": np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32)}
    before = onnxruntime.InferenceSession(model.SerializeToString()).run(None, x)[0]
    assert apply(model, qdq.clip_early) == 2
    assert [node.name for node in model.graph.node] == ["clip", "pool", "move"]
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(onnxruntime.InferenceSession(model.SerializeToString()).run(None, x)[0], before)


def test_a_clip_stays_behind_what_is_read_without_it():
    model = clipped_late({"y": [1, 4, 4, 2], "t": [1, 4, 4, 2]})
    assert apply(model, qdq.clip_early) == 0
    assert [node.name for node in model.graph.node] == ["pool", "move", "clip"]


def test_a_weight_that_would_stay_float_fails_the_export():
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"]),
        helper.make_node("QuantizeLinear", ["turned", "scale"], ["q"], name="quantize", axis=0),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"], axis=0),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    constants = {"w": np.ones((2, 2), np.float32), "scale": np.ones(2, np.float32)}
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(value, name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", contract.OPSET)], ir_version=9)
    with pytest.raises(PassError, match="pack_weights: the weight of quantize stays float"):
        apply(model, qdq.pack_weights)
