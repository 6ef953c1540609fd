"""What an export computes beforehand or writes out gives the same numbers, and leaves everything else as it is."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export import constants, projection
from export.graph import Graph
from qdbev import schema

RNG = np.random.default_rng(0)


def model_of(nodes: list[NodeProto], inputs: dict[str, list[int]], out: list[int], **values: np.ndarray) -> onnx.ModelProto:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, out)
    graph = helper.make_graph(nodes, "drawing", tensors, [result], [numpy_helper.from_array(np.array(v), k) for k, v in values.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", schema.OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def attention_to_a_table() -> onnx.ModelProto:
    """A quantized product of a table and a softmax of it, before anything was read; behind it a quantized product of the input."""
    nodes = [
        helper.make_node("QuantizeLinear", ["table", "scale", "zero"], ["table.int8"]),
        helper.make_node("DequantizeLinear", ["table.int8", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["weight"], name="w.dequantize"),
        helper.make_node("MatMul", ["rounded", "weight"], ["scores"], name="table_product"),
        helper.make_node("Softmax", ["scores"], ["shares"], name="softmax"),
        helper.make_node("Add", ["x", "table"], ["sum"]),
        helper.make_node("QuantizeLinear", ["sum", "scale", "zero"], ["sum.int8"]),
        helper.make_node("DequantizeLinear", ["sum.int8", "scale", "zero"], ["sum.rounded"]),
        helper.make_node("MatMul", ["sum.rounded", "weight"], ["y"], name="product"),
        helper.make_node("Mul", ["shares", "y"], ["out"]),
    ]
    values = {"table": RNG.standard_normal((5, 8)).astype(np.float32), "w": RNG.integers(-9, 9, (8, 8)).astype(np.int8)}
    return model_of(nodes, {"x": [5, 8]}, [5, 8], **values, scale=np.float32(0.05), zero=np.int8(0))


def test_products_of_constants_become_constants_and_the_numbers_stay() -> None:
    model, x = attention_to_a_table(), RNG.standard_normal((5, 8)).astype(np.float32)
    before = run(model, x=x)
    assert constants.fold(model) == 1
    onnx.checker.check_model(model)
    names = [node.name for node in model.graph.node]
    assert "product" in names
    assert "table_product" not in names
    assert "softmax" not in names
    np.testing.assert_array_equal(run(model, x=x), before)


def test_weights_that_are_still_read_stay_integers() -> None:
    model = attention_to_a_table()
    constants.fold(model)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {
        "w": TensorProto.INT8,
        "zero": TensorProto.INT8,
        "scale": TensorProto.FLOAT,
        "table": TensorProto.FLOAT,
        "softmax.constant": TensorProto.FLOAT,
    }


def test_a_network_that_begins_with_its_inputs_is_left_as_it_is() -> None:
    nodes = [helper.make_node("Mul", ["w", "w"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["out"], name="product")]
    model = model_of(nodes, {"x": [5, 8]}, [5, 8], w=RNG.standard_normal((8, 8)).astype(np.float32))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    assert constants.fold(model) == 0
    assert model == copy


@pytest.mark.parametrize("rows", [3, 4])
def test_a_projection_written_out_gives_the_same_points(rows: int) -> None:
    nodes = [
        helper.make_node("Slice", ["lidar2img", "start", "end", "axis"], ["chosen"]),
        helper.make_node("Einsum", ["chosen", "points"], ["out"], name="projection", equation=projection.EQUATION.decode()),
    ]
    matrices, points = RNG.standard_normal((1, 6, 4, 4)).astype(np.float32), RNG.standard_normal((4, 25, 4)).astype(np.float32)
    ends = {"start": np.array([0]), "end": np.array([rows]), "axis": np.array([2])}
    model = model_of(nodes, {"lidar2img": [1, 6, 4, 4]}, [1, 6, 25, 4, rows], points=points, **ends)
    before = run(model, lidar2img=matrices)
    assert projection.write_out(model) == 1
    onnx.checker.check_model(model)
    assert "Einsum" not in {node.op_type for node in model.graph.node}
    assert Graph(model).readers()["lidar2img"][0].op_type == "Unsqueeze"
    after = run(model, lidar2img=matrices)
    assert after.shape == (1, 6, 25, 4, rows)
    np.testing.assert_allclose(after, before, atol=2e-6)  # four products of order one, summed in another order


def test_another_einsum_stays() -> None:
    nodes = [helper.make_node("Einsum", ["x", "w"], ["out"], name="other", equation="ij,jk->ik")]
    model = model_of(nodes, {"x": [5, 8]}, [5, 8], w=RNG.standard_normal((8, 8)).astype(np.float32))
    assert projection.write_out(model) == 0
    assert [node.op_type for node in model.graph.node] == ["Einsum"]
