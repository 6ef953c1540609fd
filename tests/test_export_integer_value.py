"""Attention operators that read int8 return exactly the numbers of those behind a DequantizeLinear, at no extra cost in an engine."""

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_passes import apply

from engine import backend, build, build_tensorrt
from export.bodies.attach import attach
from export.float16 import to_float16
from export.graph import PassError
from export.integer_value import feed_int8_values
from qdbev.ops import contract
from qdbev.schema import Interface

N, M, C, Q, D, P, LEVEL_HW = 2, 2, 4, 5, 2, 4, [3, 4, 2, 2]
S, L = 16, 2
INPUTS = {
    contract.MSDA.name: {"x": [1, S, M * C], "references": [1, Q, 2], "offsets": [1, Q, M, L, P, 2], "logits": [1, Q, M, L, P]},
    contract.SCA.name: {
        "x": [1, N, S, M * C],
        "references": [1, N, Q, D, 2],
        "visible": [1, N, Q],
        "offsets": [1, Q, M, L, P, 2],
        "logits": [1, Q, M, L, P],
    },
}
OPERATORS = tuple(INPUTS)
INTERFACE = Interface(inputs={}, outputs={})


def node(op: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{output}.node", **attributes)


def model_of(op_type: str, quantized: bool = True, read_twice: bool = False, count: int = 1, zero: int = 0) -> onnx.ModelProto:
    """`count` attentions to one tensor, quantized in front of a Reshape; `read_twice` adds the dequantized tensor as an output."""
    inputs = INPUTS[op_type]
    nodes = [node("QuantizeLinear", ["x", "scale", "zero"], "x.int8"), node("DequantizeLinear", ["x.int8", "scale", "zero"], "x.rounded")]
    nodes += [node("Reshape", ["x.rounded" if quantized else "x", "shape"], "value")]
    attributes = {"domain": contract.DOMAIN, "level_hw": LEVEL_HW, **contract.PLUGIN_ATTRIBUTES}
    nodes += [node(op_type, ["value", *list(inputs)[1:]], f"read{index}", **attributes) for index in range(count)]
    outputs = {f"read{index}": [1, Q, M * C] for index in range(count)} | ({"x.rounded": inputs["x"]} if read_twice else {})
    constants = {"scale": np.float32(0.013671875), "zero": np.int8(zero), "shape": np.array([*inputs["x"][:-1], M, C])}
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    apply(model, attach)
    return model


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    """Outputs of a model on noise that is the same at every call, with a third of the points outside."""
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    sizes = {info.name: [size.dim_value for size in info.type.tensor_type.shape.dim] for info in model.graph.input}
    feeds = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    feeds["references"] = rng.uniform(-0.3, 1.3, sizes["references"]).astype(np.float32)
    if "visible" in feeds:
        feeds["visible"] = (feeds["visible"] > 0).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("op_type", OPERATORS)
def test_the_numbers_are_exactly_those_of_a_value_dequantized_before(op_type: str, half: bool) -> None:
    before = model_of(op_type, count=2)
    after = copy.deepcopy(before)
    assert apply(after, feed_int8_values) == 2
    for model in (before, after) if half else ():
        apply(model, to_float16, INTERFACE)
    for expected, found in zip(run(before), run(after), strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("op_type", OPERATORS)
def test_the_operator_reads_int8_and_the_scale_it_was_quantized_with(op_type: str, half: bool) -> None:
    model = model_of(op_type)
    attributes = list(model.graph.node[-1].attribute)
    apply(model, feed_int8_values)
    if half:
        apply(model, to_float16, INTERFACE)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    reader = next(node for node in model.graph.node if node.domain)
    assert (reader.op_type, reader.name, list(reader.attribute)) == (f"{op_type}Int8", "read0.node", attributes)
    assert [function.name for function in model.functions] == [f"{op_type}Int8"]
    scale = constants[reader.input[1]]
    assert (scale.shape, scale.dtype, float(scale)) == ((), np.float16 if half else np.float32, 0.013671875)
    move = producers[reader.input[0]]
    assert (move.op_type, producers[move.input[0]].op_type) == ("Reshape", "QuantizeLinear")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.output, *inferred.input)}
    assert kinds[reader.input[0]] == TensorProto.INT8
    assert kinds[reader.output[0]] == (TensorProto.FLOAT16 if half else TensorProto.FLOAT)
    assert {kinds[name] for name in reader.input[2:]} == {TensorProto.FLOAT}
    assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}


def test_another_reader_keeps_its_dequantized_tensor() -> None:
    before = model_of(contract.MSDA.name, read_twice=True)
    after = copy.deepcopy(before)
    assert apply(after, feed_int8_values) == 1
    for expected, found in zip(run(before), run(after), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_value_that_is_not_quantized_keeps_its_operator() -> None:
    model = model_of(contract.SCA.name, quantized=False)
    assert apply(model, feed_int8_values) == 0
    assert contract.SCA.name in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("op_type", OPERATORS)
def test_a_quantized_value_that_cannot_be_passed_as_integers_fails_the_export(op_type: str) -> None:
    with pytest.raises(PassError, match=r"feed_int8_values: the value of read0\.node is quantized.*found x\.rounded\.node"):
        apply(model_of(op_type, zero=3), feed_int8_values)


@pytest.mark.parametrize("op_type", OPERATORS)
def test_an_engine_has_as_many_kernels_as_with_a_value_dequantized_before(op_type: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install -r requirements.txt")
    chosen, kernels = backend.load("tensorrt-rtx"), []
    for integer in (False, True):
        model, path = model_of(op_type, count=2), tmp_path / "attention.onnx"
        if integer:
            apply(model, feed_int8_values)
        onnx.save(model, path)
        table = build_tensorrt.build_plan(chosen, path, build.Options()).table
        kernels.append(sum(layer.is_kernel for layer in table))
    assert kernels[1] <= kernels[0]
