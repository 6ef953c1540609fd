"""The ONNX bodies of the custom operators against the PyTorch operators."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_passes import apply

from export.bodies.attach import attach
from qdbev.ops import contract
from qdbev.ops.msda import multi_scale_deformable_attention
from qdbev.ops.sca import spatial_cross_attention

ONE_LEVEL, TWO_LEVELS = [(5, 7)], [(6, 9), (3, 5)]
ATOL = 2e-6  # float32 sums of up to 64 products of order one, in another order


def custom_model(op_type, tensors, level_hw):
    """A model of one custom node, with its body."""
    names = contract.OPERATORS[op_type].inputs
    flat = [size for hw in level_hw for size in hw]
    node = helper.make_node(
        op_type, names, ["out"], name="op", domain=contract.DOMAIN, level_hw=flat, plugin_namespace="qdbev", plugin_version="1"
    )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name, x in zip(names, tensors, strict=True)]
    B, Q, M = tensors[-1].shape[:3]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [B, Q, M * tensors[0].shape[-1]])
    model = helper.make_model(helper.make_graph([node], "op", inputs, [output]), opset_imports=[helper.make_opsetid("", contract.OPSET)])
    model.ir_version = 10
    apply(model, attach)
    onnx.checker.check_model(model)
    return model


def run_body(op_type, tensors, level_hw):
    model = custom_model(op_type, tensors, level_hw)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: x.numpy() for name, x in zip(contract.OPERATORS[op_type].inputs, tensors, strict=True)}
    return session.run(None, feeds)[0]


def msda_inputs(level_hw, B=2, Q=5, M=2, C=3, P=4):
    torch.manual_seed(0)
    S, L = sum(h * w for h, w in level_hw), len(level_hw)
    points = torch.rand(B, Q, 2) * 1.6 - 0.3  # a third outside
    return [torch.randn(B, S, M, C), points, torch.randn(B, Q, M, L, P, 2) * 2, torch.randn(B, Q, M, L, P)]


def sca_inputs(level_hw, B=2, N=3, Q=5, M=2, C=3, D=4, P=8):
    torch.manual_seed(0)
    S, L = sum(h * w for h, w in level_hw), len(level_hw)
    points = torch.rand(B, N, Q, D, 2) * 1.6 - 0.3
    visible = (torch.rand(B, N, Q) > 0.5).float()
    return [torch.randn(B, N, S, M, C), points, visible, torch.randn(B, Q, M, L, P, 2) * 2, torch.randn(B, Q, M, L, P)]


@pytest.mark.parametrize("level_hw", [ONE_LEVEL, TWO_LEVELS])
@pytest.mark.parametrize(("num_query", "P"), [(1, 4), (5, 4), (5, 1), (5, 7)])
def test_msda_body_equals_the_operator(level_hw, num_query, P):
    tensors = msda_inputs(level_hw, Q=num_query, P=P)
    expected = multi_scale_deformable_attention(*tensors, level_hw)
    np.testing.assert_allclose(run_body(contract.MSDA.name, tensors, level_hw), expected.numpy(), atol=ATOL)


@pytest.mark.parametrize("level_hw", [ONE_LEVEL, TWO_LEVELS])
@pytest.mark.parametrize(("num_query", "D", "P"), [(1, 4, 8), (5, 4, 8), (5, 1, 3), (5, 2, 2)])
def test_sca_body_equals_the_operator(level_hw, num_query, D, P):
    tensors = sca_inputs(level_hw, Q=num_query, D=D, P=P)
    expected = spatial_cross_attention(*tensors, level_hw)
    np.testing.assert_allclose(run_body(contract.SCA.name, tensors, level_hw), expected.numpy(), atol=ATOL)


def test_points_far_outside_read_zero():
    tensors = msda_inputs(TWO_LEVELS)
    tensors[1] += 1e5
    assert not run_body(contract.MSDA.name, tensors, TWO_LEVELS).any()


def test_a_query_that_no_camera_sees_reads_zero():
    tensors = sca_inputs(TWO_LEVELS)
    tensors[2][:, :, 1] = 0
    out = run_body(contract.SCA.name, tensors, TWO_LEVELS)
    assert not out[:, 1].any()
    np.testing.assert_allclose(out, spatial_cross_attention(*tensors, TWO_LEVELS).numpy(), atol=ATOL)


def test_all_cameras_blind_reads_zero():
    tensors = sca_inputs(ONE_LEVEL)
    tensors[2].zero_()
    assert not run_body(contract.SCA.name, tensors, ONE_LEVEL).any()


def test_one_operator_with_two_numbers_of_levels_is_refused():
    model = custom_model(contract.MSDA.name, msda_inputs(ONE_LEVEL), ONE_LEVEL)
    other = custom_model(contract.MSDA.name, msda_inputs(TWO_LEVELS), TWO_LEVELS)
    other.graph.node[0].input[2] = other.graph.input[2].name = "others"
    other.graph.node[0].output[0] = "out2"
    model.graph.input.append(other.graph.input[2])
    model.graph.node.extend(other.graph.node)
    with pytest.raises(ValueError, match=r"used with \[1, 2\] levels and \[4\] points"):
        apply(model, attach)


def test_offsets_of_unknown_shape_are_refused():
    model = custom_model(contract.MSDA.name, msda_inputs(ONE_LEVEL), ONE_LEVEL)
    model.graph.node[0].input[2] = "others"
    with pytest.raises(ValueError, match="shape of others, the sampling offsets of node op, does not follow"):
        apply(model, attach)


def test_an_operator_without_a_body_is_refused():
    model = custom_model(contract.MSDA.name, msda_inputs(ONE_LEVEL), ONE_LEVEL)
    model.graph.node[0].op_type = "Mystery"
    with pytest.raises(ValueError, match="Mystery"):
        apply(model, attach)
