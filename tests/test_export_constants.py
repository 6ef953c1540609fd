"""Folding constants and expanding projections at export keep the numbers, and change nothing else."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_passes import apply

from export.constants import fold_constant_products
from export.graph import PassError
from export.projection import expand_projection
from qdbev.ops import contract

RNG = np.random.default_rng(0)


def model_of(nodes: list[NodeProto], inputs: dict[str, list[int]], out: list[int], **values: np.ndarray) -> onnx.ModelProto:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, out)
    graph = helper.make_graph(nodes, "drawing", tensors, [result], [numpy_helper.from_array(np.array(v), k) for k, v in values.items()])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.DOMAIN, 1)], ir_version=9
    )
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def attention_to_a_table() -> onnx.ModelProto:
    """A quantized product of a table and a softmax of it, which depend on no input, and then a quantized product of the input."""
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
    assert apply(model, fold_constant_products) == 1
    onnx.checker.check_model(model)
    names = [node.name for node in model.graph.node]
    assert "product" in names
    assert "table_product" not in names
    assert "softmax" not in names
    np.testing.assert_array_equal(run(model, x=x), before)


def test_weights_that_are_still_read_stay_integers() -> None:
    model = attention_to_a_table()
    apply(model, fold_constant_products)
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
    assert apply(model, fold_constant_products) == 0
    assert [node.op_type for node in model.graph.node] == ["Mul", "MatMul"]


def test_a_product_of_constants_that_cannot_be_computed_fails_the_export() -> None:
    nodes = [
        helper.make_node("Unknown", ["w"], ["v"], name="custom", domain=contract.DOMAIN),
        helper.make_node("MatMul", ["v", "w"], ["made"], name="product"),
        helper.make_node("Add", ["x", "made"], ["out"]),
    ]
    model = model_of(nodes, {"x": [8, 8]}, [8, 8], w=RNG.standard_normal((8, 8)).astype(np.float32))
    with pytest.raises(PassError, match="fold_constant_products: MatMul product depends on no input"):
        apply(model, fold_constant_products)


def projection(equation: str, rows: int = 4, op_type: str = "Einsum", points_shape: tuple[int, ...] = (4, 25, 4)) -> onnx.ModelProto:
    """A model that transforms points by a matrix from an input; all axes but the contracted one have different sizes."""
    attributes = {"equation": equation} if op_type == "Einsum" else {}
    nodes = [
        helper.make_node("Slice", ["lidar2img", "start", "end", "axis"], ["chosen"]),
        helper.make_node(op_type, ["chosen", "points"], ["out"], name="projection", **attributes),
    ]
    ends = {"start": np.array([0]), "end": np.array([rows]), "axis": np.array([2])}
    points = RNG.standard_normal(points_shape).astype(np.float32)
    shape = list(np.einsum(equation, np.zeros((2, 6, rows, points_shape[-1])), points).shape)
    return model_of(nodes, {"lidar2img": [2, 6, 4, points_shape[-1]]}, shape, points=points, **ends)


@pytest.mark.parametrize("rows", [3, 4])
@pytest.mark.parametrize("equation", ["bnij,dkj->bnkdi", "xyzw, pqw -> xyqpz", "bnij,dkj->dbkin"])
def test_an_expanded_projection_gives_the_same_points_whatever_its_letters(equation: str, rows: int) -> None:
    model, matrices = projection(equation, rows), RNG.standard_normal((2, 6, 4, 4)).astype(np.float32)
    before = run(model, lidar2img=matrices)
    assert apply(model, expand_projection, ["lidar2img"]) == 1
    onnx.checker.check_model(model, full_check=True)
    assert "Einsum" not in {node.op_type for node in model.graph.node}
    assert {node.op_type for node in model.graph.node if "lidar2img" in node.input} <= {"Unsqueeze", "Transpose"}  # no rows are copied
    after = run(model, lidar2img=matrices)
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, atol=2e-6)  # four products of order one, summed in another order


@pytest.mark.parametrize(
    ("equation", "geometry", "points_shape"), [("bnij,dkj->bnkdi", [], (4, 25, 4)), ("bnij,dkj->bnkdi", ["lidar2img"], (4, 25, 64))]
)
def test_a_learned_product_stays(equation: str, geometry: list[str], points_shape: tuple[int, ...]) -> None:
    """A product of features, and one of geometry that sums over many channels."""
    model = projection(equation, points_shape=points_shape)
    assert apply(model, expand_projection, geometry) == 0
    assert [node.op_type for node in model.graph.node] == ["Slice", "Einsum"]


@pytest.mark.parametrize(
    ("equation", "op_type", "points_shape"), [("bnij,jk->bnik", "MatMul", (4, 4)), ("bnij,dki->bnkdj", "Einsum", (4, 25, 4))]
)
def test_a_projection_in_another_form_fails_the_export(equation: str, op_type: str, points_shape: tuple[int, ...]) -> None:
    model = projection(equation, op_type=op_type, points_shape=points_shape)
    with pytest.raises(PassError, match=f"expand_projection: {op_type} projection transforms coordinates by geometry inputs"):
        apply(model, expand_projection, ["lidar2img"])
