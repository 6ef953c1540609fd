"""Reading deployed ONNX graphs: which files are refused, and what is derived from a graph."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdbev import deployed_graph
from qdbev.deployed_graph import DeployedGraphError
from qdbev.ops import contract
from qdbev.schema import Interface

INTERFACE = Interface(inputs={"images": (2, 4), "pose": (4, 4)}, outputs={"boxes": (2, 4)}, geometry=("pose",))
PATH = Path("net.onnx")


def model_of(op: str = "Identity", weight: np.ndarray | None = None, body: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    """A model that computes `boxes` from images, the pose and a weight; with a `body`, `op` is a custom operator with that body."""
    domain = contract.DOMAIN if op != "Identity" else ""
    nodes = [
        helper.make_node("MatMul", ["pose", "w"], ["moved"], name="moved"),
        helper.make_node("MatMul", ["images", "moved"], ["mixed"]),
        helper.make_node(op, ["mixed"], ["boxes"], name="last", domain=domain),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in INTERFACE.inputs.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in INTERFACE.outputs.items()]
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32) if weight is None else weight, "w")]
    opsets = [helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    functions = [helper.make_function(contract.DOMAIN, op, ["x"], ["y"], body, opsets)] if body else []
    graph = helper.make_graph(nodes, "drawing", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


def test_the_graph_of_the_interface_passes_with_a_body_or_a_plugin() -> None:
    deployed_graph.check(PATH, model_of(), INTERFACE)
    deployed_graph.check(PATH, model_of("Act", body=[helper.make_node("Relu", ["x"], ["y"])]), INTERFACE)
    deployed_graph.check(PATH, model_of("Act"), INTERFACE, frozenset({("Act", "1", "qdbev")}))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": (2, 8), "pose": (4, 4)}, r"net\.onnx: images has the shape \(2, 4\), expected \(2, 8\); export it again"),
        ({"images": (2, 4), "depth": (4, 4)}, r"has the inputs images, pose; .* images, depth \(missing: depth; unknown: pose\)"),
    ],
)
def test_another_interface_is_refused(inputs: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(DeployedGraphError, match=message):
        deployed_graph.check(PATH, model_of(), Interface(inputs=inputs, outputs=INTERFACE.outputs))


def test_an_operator_without_body_or_plugin_is_named_also_inside_a_body() -> None:
    inner = helper.make_node("Mystery", ["x"], ["y"], name="inner", domain=contract.DOMAIN)
    for model, name in ((model_of("Act"), "last is a qdbev::Act"), (model_of("Act", body=[inner]), "inner is a qdbev::Mystery")):
        with pytest.raises(DeployedGraphError, match=f"node {name} without a function body"):
            deployed_graph.check(PATH, model, INTERFACE)


def test_weights_that_no_engine_can_take_are_named() -> None:
    nan = np.eye(4, dtype=np.float32)
    nan[0, 0] = np.nan
    with pytest.raises(DeployedGraphError, match=r"net\.onnx: 1 of 16 values of weight w are NaN"):
        deployed_graph.check(PATH, model_of(weight=nan), INTERFACE)
    deployed_graph.require_int8_storage(PATH, model_of())
    with pytest.raises(DeployedGraphError, match="weight w is packed to 4 bits"):
        deployed_graph.require_int8_storage(PATH, model_of(weight=np.eye(4).astype(ml_dtypes.int4)))


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist; export it first"), (b"x", "is damaged"), (b"", "holds no graph")])
def test_a_file_that_is_no_onnx_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / PATH).write_bytes(content)
    with pytest.raises(DeployedGraphError, match=message):
        deployed_graph.load(tmp_path / PATH)


def test_dependencies_name_the_inputs_behind_each_tensor() -> None:
    found = deployed_graph.dependencies(model_of())
    assert (found["moved"], found["boxes"]) == ({"pose"}, {"pose", "images"})
    assert "w" not in found
    assert deployed_graph.shapes(model_of())["mixed"] == (2, 4)


def test_a_graph_that_contradicts_itself_is_refused() -> None:
    without_opset = model_of()
    del without_opset.opset_import[:]
    cut = model_of()
    cut.graph.initializer[0].raw_data = cut.graph.initializer[0].raw_data[:5]
    for model, message in ((without_opset, "the graph contradicts itself"), (cut, "weight w is damaged")):
        with pytest.raises(DeployedGraphError, match=rf"net\.onnx: {message}"):
            deployed_graph.check(PATH, model, INTERFACE)
