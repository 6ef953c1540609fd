"""Nodes of operator set 18 as TensorRT 8.6 reads them: the same numbers from operator set 17."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_passes import apply

from export import tensorrt_8
from qdbev.ops import contract

RNG = np.random.default_rng(0)


def model_of(
    nodes: list[NodeProto], y: list[int], functions: tuple[onnx.FunctionProto, ...] = (), **constants: np.ndarray
) -> onnx.ModelProto:
    """A model of `nodes` from x (2, 4, 6) to an output of shape `y`."""
    tensors = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2, 4, 6]), ("y", y))]
    opsets = [helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.DOMAIN, 1)]
    drawn = helper.make_graph(nodes, "drawn", ends[:1], ends[1:], tensors)
    return helper.make_model(drawn, opset_imports=opsets, ir_version=10, functions=functions)


def run(model: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(1).standard_normal((2, 4, 6)).astype(np.float32)})[0]


def converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a model, and check that its numbers stay and that it follows the rules of operator set 17."""
    after = copy.deepcopy(model)
    apply(after, tensorrt_8.convert)
    onnx.checker.check_model(after, full_check=True)
    assert [(entry.domain, entry.version) for entry in after.opset_import if not entry.domain] == [("", 17)]
    np.testing.assert_array_equal(run(after), run(model))
    return after


@pytest.mark.parametrize("op_type", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"])
def test_axes_of_a_reduction_become_an_attribute(op_type: str) -> None:
    nodes = [helper.make_node(op_type, ["x", "axes"], ["y"], keepdims=0, noop_with_empty_axes=0)]
    (node,) = converted(model_of(nodes, [2], axes=np.array([1, -1]))).graph.node
    assert list(node.input) == ["x"]
    assert {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute} == {"axes": [1, -1], "keepdims": 0}


def test_axes_of_a_sum_stay_an_input() -> None:
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)]
    assert list(converted(model_of(nodes, [2, 6], axes=np.array([1]))).graph.node[0].input) == ["x", "axes"]


def test_a_split_counts_its_outputs() -> None:
    nodes = [helper.make_node("Split", ["x"], ["a", "b"], axis=2, num_outputs=2), helper.make_node("Sub", ["a", "b"], ["y"])]
    assert [attribute.name for attribute in converted(model_of(nodes, [2, 4, 3])).graph.node[0].attribute] == ["axis"]


def test_a_resize_loses_what_is_as_it_was() -> None:
    attributes = {"mode": "nearest", "antialias": 0, "keep_aspect_ratio_policy": "stretch"}
    nodes = [helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **attributes)]
    (node,) = converted(model_of(nodes, [2, 8, 12], sizes=np.array([2, 8, 12]))).graph.node
    assert [attribute.name for attribute in node.attribute] == ["mode"]


def test_a_resize_that_needs_set_18_is_refused() -> None:
    nodes = [helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], name="neck.up", mode="linear", antialias=1)]
    with pytest.raises(ValueError, match=r"antialias=1 of node neck\.up has no form in operator set 17; leave --builtin-plugin out"):
        apply(model_of(nodes, [2, 8, 12], sizes=np.array([2, 8, 12])), tensorrt_8.convert)


def test_an_operator_that_is_new_in_set_18_is_refused() -> None:
    with pytest.raises(ValueError, match="node act is a Mish of operator set 18, which has no form in 17; leave --builtin-plugin out"):
        apply(model_of([helper.make_node("Mish", ["x"], ["y"], name="act")], [2, 4, 6]), tensorrt_8.convert)


def test_bodies_are_written_out_and_their_sizes_become_constants() -> None:
    body = [
        helper.make_node("Shape", ["a"], ["size"], start=1, end=2),
        helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
        helper.make_node("Concat", ["size", "rest"], ["shape"], axis=0),
        helper.make_node("Transpose", ["a"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("Reshape", ["turned", "shape"], ["b"]),
    ]
    function = helper.make_function(contract.DOMAIN, "Flat", ["a"], ["b"], body, [helper.make_opsetid("", contract.OPSET)])
    after = converted(model_of([helper.make_node("Flat", ["x"], ["y"], domain=contract.DOMAIN)], [4, 12], (function,)))
    assert [node.op_type for node in after.graph.node] == ["Transpose", "Reshape"]
    assert [numpy_helper.to_array(tensor).tolist() for tensor in after.graph.initializer] == [[4, -1]]


@pytest.mark.parametrize(("axis", "scales"), [(1, 5), (0, 6), (None, None)])
def test_integer_weights_become_floats_in_front_of_q_dq_on_the_same_grid(axis: int | None, scales: int | None) -> None:
    steps = np.float32(0.013671875) if scales is None else np.linspace(0.5, 2, scales, dtype=np.float32) * np.float32(0.01)
    axes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("DequantizeLinear", ["w.int8", "scale"], ["w"], name="dq", **axes),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weight = RNG.integers(-127, 128, (6, 5)).astype(np.int8)
    weight[0, 0] = -127
    after = converted(model_of(nodes, [2, 4, 5], **{"w.int8": weight, "scale": steps}))
    quantize, dequantize, _ = after.graph.node
    assert [quantize.op_type, dequantize.op_type] == ["QuantizeLinear", "DequantizeLinear"]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    assert constants[quantize.input[0]].dtype == np.float32
    assert constants[quantize.input[2]].shape == steps.shape
    assert list(quantize.input[1:]) == list(dequantize.input[1:])
