"""Deformable convolution in ONNX, as gather and product or as the standard node: both equal PyTorch."""

from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx_passes import apply
from small_networks import DATA, IMAGE_HW, OUTPUTS, calibrate_on_noise, exported_network

from engine import backend, build, build_tensorrt
from engine.backend import EngineError
from export import deform_conv, parity, to_onnx
from export.bodies.attach import attach
from qdbev import artifact
from qdbev.artifact import Seal
from qdbev.config import Config, to_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.facts import StudentFacts, TeacherFacts
from qdbev.nn.config import BackboneConfig
from qdbev.ops import contract
from qdbev.ops.deform_conv import DeformConv2d, modulated_deformable_im2col
from qdbev.restore import quantized


def small_config() -> Config:
    """A network with two deformable stages after strides of two, as in the official networks."""
    backbone = BackboneConfig(depths=(1, 1, 1), width=8, out_stages=(1, 2), style="caffe", deformable_stages=(1, 2))
    return exported_network(backbone=backbone)


def small_model() -> BEVFormer:
    """A network with random weights and offsets of about a pixel, so that every tap is between pixels."""
    torch.manual_seed(0)
    model = BEVFormer(small_config().model).eval()
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            torch.nn.init.normal_(module.offset.weight, std=0.05)
            torch.nn.init.normal_(module.offset.bias)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.1)  # what the folded convolution adds
    return model


def seal(kind: str) -> Seal:
    return Seal(
        kind=kind,
        config=to_dict(small_config()),
        parent=None,
        facts=StudentFacts() if kind == "student" else TeacherFacts(),
        provenance={},
        sha256=kind,
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports of the float model by whether the standard node is used: proto, parity rows and seal."""
    folder, model = tmp_path_factory.mktemp("export"), small_model()
    frames = noise_frames(DATA, model.config.num_cameras, IMAGE_HW)
    made = {}
    with traced_once(model):
        for standard in (False, True):
            path = folder / f"{standard}.onnx"
            rows, sealed = to_onnx.export(model, seal("teacher"), path, IMAGE_HW, frames, standard)
            made[standard] = onnx.load(path), rows, sealed
    return made


@contextmanager
def traced_once(model):
    """Let all exports of `model` begin with a copy of one traced graph."""
    traced = to_onnx.trace(model, IMAGE_HW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "trace", lambda *_: traced.clone())
        yield


def im2col_model(x, offsets, mask, stride):
    names = contract.OPERATORS[contract.IM2COL.name].inputs
    node = helper.make_node(
        contract.IM2COL.name, names, ["out"], name="op", domain=contract.DOMAIN, stride=stride, **contract.PLUGIN_ATTRIBUTES
    )
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(t.shape)) for n, t in zip(names, (x, offsets, mask), strict=True)]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [x.shape[0], 9 * x.shape[1], *mask.shape[2:]])
    model = helper.make_model(helper.make_graph([node], "op", inputs, [output]), opset_imports=[helper.make_opsetid("", contract.OPSET)])
    model.ir_version = 10
    apply(model, attach)
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize(("stride", "out_hw"), [(1, (7, 9)), (2, (4, 5))])
def test_the_body_gathers_what_the_operator_gathers(stride, out_hw):
    torch.manual_seed(0)
    x, offsets, mask = torch.randn(2, 3, 7, 9), torch.randn(2, 18, *out_hw) * 3, torch.rand(2, 9, *out_hw)
    session = onnxruntime.InferenceSession(im2col_model(x, offsets, mask, stride).SerializeToString())
    got = session.run(None, {"x": x.numpy(), "offsets": offsets.numpy(), "mask": mask.numpy()})[0]
    # float32 coordinates of up to 20 pixels carry errors of 1e-6 pixels
    np.testing.assert_allclose(got, modulated_deformable_im2col(x, offsets, mask, stride).numpy(), atol=1e-5)


@pytest.mark.parametrize("standard", [False, True])
def test_both_forms_compute_what_pytorch_computes(exports, standard):
    _, rows, _ = exports[standard]
    assert len(rows) == 2 * len(OUTPUTS)
    assert all(row.passed for row in rows), parity.table(rows)


def test_the_gather_is_one_node_before_an_ordinary_product(exports):
    proto, _, made = exports[False]
    nodes = {node.name: node for node in proto.graph.node}
    gathers = [node for node in proto.graph.node if node.op_type == contract.IM2COL.name]
    assert sorted(node.name for node in gathers) == ["backbone.layer2.0.conv2", "backbone.layer3.0.conv2"]
    for gather in gathers:
        product = nodes[f"{gather.name}.product"]
        assert (product.op_type, product.input[0]) == ("Conv", gather.output[0])
    assert made.facts.opset == contract.OPSET


def test_the_standard_form_has_one_deform_conv_each_and_no_gather(exports):
    proto, _, made = exports[True]
    onnx.checker.check_model(proto)
    convolutions = [node for node in proto.graph.node if node.op_type == "DeformConv"]
    assert sorted(node.name for node in convolutions) == ["backbone.layer2.0.conv2.product", "backbone.layer3.0.conv2.product"]
    assert contract.IM2COL.name not in {node.op_type for node in proto.graph.node} | {function.name for function in proto.functions}
    assert made.facts.opset == 19
    assert {entry.version for owner in (proto, *proto.functions) for entry in owner.opset_import if not entry.domain} == {19}


def test_a_quantized_product_runs_on_integers_and_cannot_become_a_standard_node(tmp_path):
    model = quantized(small_config(), small_model()).eval()
    frames = noise_frames(DATA, model.config.num_cameras, IMAGE_HW)
    calibrate_on_noise(model)
    path = tmp_path / "w8a8.onnx"
    with traced_once(model):
        rows, _ = to_onnx.export(model, seal("student"), path, IMAGE_HW, frames)
        with pytest.raises(ValueError, match="no integer form: leave --standard-deform-conv out"):
            to_onnx.export(model, seal("student"), tmp_path / "standard.onnx", IMAGE_HW, frames, True)
    assert all(row.passed for row in rows), parity.table(rows)
    proto = onnx.load(path)
    producers = {output: node for node in proto.graph.node for output in node.output}
    product = next(node for node in proto.graph.node if node.name == "backbone.layer3.0.conv2.product")
    assert [producers[name].op_type for name in product.input[:2]] == ["DequantizeLinear", "DequantizeLinear"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["w8a8.onnx", artifact.seal_path(path).name]


def test_a_model_without_deformable_convolution_has_nothing_to_replace(exports):
    with pytest.raises(ValueError, match="no deformable convolution"):
        deform_conv.use_standard_node(ir.from_proto(exports[True][0]))


@pytest.mark.trt
def test_an_engine_builds_from_gather_and_product_and_the_standard_node_is_refused_with_the_way_out(exports, tmp_path):
    chosen = backend.load("tensorrt-rtx")
    for standard, (proto, _, _) in exports.items():
        onnx.save(proto, tmp_path / f"{standard}.onnx")
    assert build_tensorrt.build_plan(chosen, tmp_path / "False.onnx", build.Options()).content
    with pytest.raises(EngineError, match=r"(?s)conv2.product \(DeformConv\).*export again without --standard-deform-conv"):
        build_tensorrt.build_plan(chosen, tmp_path / "True.onnx", build.Options())
