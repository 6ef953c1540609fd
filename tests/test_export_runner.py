"""OnnxRunner: which files it opens, which it refuses, and how it runs them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sealed_facts import onnx_facts
from small_networks import INPUTS, OUTPUTS

from export.runner import OnnxRunner
from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.deployed_graph import DeployedGraphError
from qdbev.ops import contract
from qdbev.schema import Interface

SHAPE = [1, 3]
INTERFACE = Interface(inputs=dict.fromkeys(INPUTS, (1, 3)), outputs=dict.fromkeys(OUTPUTS, (1, 3)))


def deployed_model(**changes):
    """A graph with the deployed names: each output is one input plus a constant."""
    outputs = changes.get("outputs", OUTPUTS)
    nodes = [helper.make_node("Add", [source, "one"], [name], name=name) for source, name in zip(INPUTS, outputs, strict=False)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in INPUTS],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in outputs],
        [numpy_helper.from_array(np.full(3, changes.get("weight", 1.0), np.float32), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.DOMAIN, 1)])
    model.ir_version = 10
    return model


def sealed(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    artifact.seal(path, config={}, parent=None, facts=onnx_facts(INTERFACE))
    return path


def inputs():
    return {name: np.full(SHAPE, index, np.float32) for index, name in enumerate(INPUTS)}


def test_a_sealed_graph_runs_by_name(tmp_path):
    runner = OnnxRunner(sealed(tmp_path, deployed_model()))
    outputs = runner(inputs())
    assert list(outputs) == list(OUTPUTS)
    assert [float(value[0, 0]) for value in outputs.values()] == [1.0, 2.0, 3.0]
    assert runner.seal.kind == "onnx"


def test_a_file_that_changed_after_sealing_is_refused(tmp_path):
    path = sealed(tmp_path, deployed_model())
    path.write_bytes(deployed_model(weight=2.0).SerializeToString())
    with pytest.raises(ArtifactError, match="not the file that was sealed"):
        OnnxRunner(path)


@pytest.mark.parametrize("content", [b"no onnx at all", b""])
def test_a_corrupt_file_is_refused(tmp_path, content):
    with pytest.raises(DeployedGraphError, match="damaged|holds no graph"):
        OnnxRunner(sealed(tmp_path, content))


def test_other_output_names_are_refused(tmp_path):
    with pytest.raises(DeployedGraphError, match="outputs scores"):
        OnnxRunner(sealed(tmp_path, deployed_model(outputs=("scores", "box_code", "bev"))))


def test_a_custom_operator_without_a_body_is_refused(tmp_path):
    model = deployed_model()
    model.graph.node[0].domain = contract.DOMAIN
    with pytest.raises(DeployedGraphError, match="node cls_logits is a qdbev::Add without a function body"):
        OnnxRunner(sealed(tmp_path, model))


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, weight):
    with pytest.raises(DeployedGraphError, match="3 of 3 values of weight one are NaN or infinite"):
        OnnxRunner(sealed(tmp_path, deployed_model(weight=weight)))


def test_a_graph_that_onnxruntime_refuses_is_one_clear_error(tmp_path):
    model = deployed_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ArtifactError, match="onnxruntime cannot open"):
        OnnxRunner(sealed(tmp_path, model))


def test_wrong_inputs_are_named(tmp_path):
    runner = OnnxRunner(sealed(tmp_path, deployed_model()))
    with pytest.raises(ValueError, match="can_bus is float32 \\(3,\\)"):
        runner(inputs() | {"can_bus": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="can_bus is float64"):
        runner(inputs() | {"can_bus": np.zeros(SHAPE)})
    with pytest.raises(ValueError, match="the graph takes"):
        runner({name: value for name, value in inputs().items() if name != "bev" and name != "images"})


def test_quantize_and_dequantize_are_executed_literally(tmp_path):
    """A bias stays float32: as int32 with scale 1 * 1, onnxruntime's own form, 0.25 would become 0."""
    model = deployed_model()
    constants = {
        "scale": np.float32(1),
        "zero": np.int8(0),
        "fine": np.float32(0.25),
        "weight": np.eye(3, dtype=np.int8)[..., None, None],
        "bias": np.full(3, 0.25, np.float32),
        "pixel": np.array([1, 3, 1, 1]),
        "flat": np.array(SHAPE),
    }
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    del model.graph.node[0]
    model.graph.node.extend(
        [
            helper.make_node("Reshape", ["images", "pixel"], ["shaped"]),
            helper.make_node("QuantizeLinear", ["shaped", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
            helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w"]),
            helper.make_node("Conv", ["x", "w", "bias"], ["y"]),
            helper.make_node("QuantizeLinear", ["y", "fine", "zero"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "fine", "zero"], ["yd"]),
            helper.make_node("Reshape", ["yd", "flat"], ["cls_logits"]),
        ]
    )
    onnx.checker.check_model(model)
    outputs = OnnxRunner(sealed(tmp_path, model))(inputs() | {"images": np.array([[1.0, 2.0, 3.0]], np.float32)})
    np.testing.assert_array_equal(outputs["cls_logits"], np.array([[1.25, 2.25, 3.25]], np.float32))


def test_inputs_that_are_no_arrays_are_refused_by_name():
    runner = OnnxRunner(Path(__file__).with_name("format1") / "w4a6.onnx")
    inputs = {name: np.zeros(shape, np.float32) for name, shape in runner.interface.inputs.items()}
    with pytest.raises(ValueError, match="can_bus is int64"):
        runner({**inputs, "can_bus": [0] * 18})
    with pytest.raises(ValueError, match="inputs are missing; the graph takes images"):
        runner({})
