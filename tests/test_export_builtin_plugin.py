"""The export for TensorRT 8.6: its own attention plugin gives the results of our operators, and the graph follows its rules."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_passes import apply
from small_networks import DATA, IMAGE_HW, calibrate_on_noise, exported_network

from engine import onnx_products, trt86_check
from engine.backend import EngineError
from export import parity, to_onnx
from export.bodies.attach import attach
from export.builtin_plugin import replace_attention_with_builtin_plugin, with_bodies
from export.trace import trace
from qdbev import deployed_graph
from qdbev.artifact import Seal
from qdbev.config import to_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.facts import StudentFacts, TeacherFacts
from qdbev.nn.config import BackboneConfig
from qdbev.ops import contract
from qdbev.ops.deform_conv import DeformConv2d
from qdbev.ops.msda import multi_scale_deformable_attention
from qdbev.ops.sca import spatial_cross_attention
from qdbev.restore import quantized

PLUGINS = frozenset({("MultiscaleDeformableAttnPlugin_TRT", "1", "")})
"""The attention plugin as TensorRT 8.6 registers it: name, version and namespace."""
ONE_LEVEL, TWO_LEVELS = [(5, 7)], [(6, 9), (3, 5)]
ATOL = 2e-6  # float32 sums of up to 64 products of order one, in another order
INTERFACE = exported_network().model.interface(IMAGE_HW)
B, N, Q, M, C = 2, 3, 5, 2, 3
Exports = dict[bool, tuple[onnx.ModelProto, list[parity.OutputParity]]]


def tensors_of(op_type: str, level_hw: list[tuple[int, int]], D: int, P: int) -> list[torch.Tensor]:
    """Inputs of an attention; a third of the points are outside, and one query is seen by no camera."""
    torch.manual_seed(0)
    S, L = sum(h * w for h, w in level_hw), len(level_hw)
    sampling = [torch.randn(B, Q, M, L, P, 2) * 2, torch.randn(B, Q, M, L, P)]
    if op_type == contract.MSDA.name:
        return [torch.randn(B, S, M, C), torch.rand(B, Q, 2) * 1.6 - 0.3, *sampling]
    visible = (torch.rand(B, N, Q) > 0.5).float()
    visible[:, :, 1] = 0
    return [torch.randn(B, N, S, M, C), torch.rand(B, N, Q, D, 2) * 1.6 - 0.3, visible, *sampling]


def replaced(op_type: str, level_hw: list[tuple[int, int]], D: int = 2, P: int = 4) -> tuple[onnx.ModelProto, list[torch.Tensor]]:
    """A model in which the plugin computes one attention, and its inputs."""
    tensors, names = tensors_of(op_type, level_hw, D, P), contract.OPERATORS[op_type].inputs
    flat = [size for hw in level_hw for size in hw]
    node = helper.make_node(op_type, names, ["out"], name="attention", domain=contract.DOMAIN, level_hw=flat, **contract.PLUGIN_ATTRIBUTES)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name, x in zip(names, tensors, strict=True)]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [B, Q, M * C])
    opsets = [helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "op", inputs, [output]), opset_imports=opsets, ir_version=10)
    apply(model, attach)
    assert apply(model, replace_attention_with_builtin_plugin) == 1
    return model, tensors


@pytest.mark.parametrize("level_hw", [ONE_LEVEL, TWO_LEVELS])
@pytest.mark.parametrize(("D", "P"), [(4, 8), (1, 3), (2, 2)])
@pytest.mark.parametrize("op_type", [contract.MSDA.name, contract.SCA.name])
def test_the_plugin_and_the_nodes_around_it_equal_the_operator(op_type: str, level_hw: list[tuple[int, int]], D: int, P: int) -> None:
    model, tensors = replaced(op_type, level_hw, D, P)
    truth = multi_scale_deformable_attention if op_type == contract.MSDA.name else spatial_cross_attention
    expected = truth(*tensors, level_hw)
    model = with_bodies(model)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: x.numpy() for name, x in zip(contract.OPERATORS[op_type].inputs, tensors, strict=True)})
    np.testing.assert_allclose(found, expected.numpy(), atol=ATOL)


@pytest.mark.parametrize(("op_type", "batch"), [(contract.MSDA.name, B), (contract.SCA.name, B * N)])
def test_the_plugin_gets_what_its_source_asks_for(op_type: str, batch: int) -> None:
    model, _ = replaced(op_type, TWO_LEVELS)
    assert not model.functions
    node = next(node for node in model.graph.node if node.domain)
    assert (node.op_type, node.name, len(node.output)) == ("MultiscaleDeformableAttnPlugin_TRT", "attention", 1)
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert given == {"plugin_namespace": b"", "plugin_version": b"1"}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    sizes, starts = (constants[name] for name in node.input[1:3])
    assert sizes.dtype == starts.dtype == np.int32
    assert (sizes.tolist(), starts.tolist()) == ([[6, 9], [3, 5]], [0, 54])
    shapes = {info.name: [size.dim_value for size in info.type.tensor_type.shape.dim] for info in inferred(model)}
    wanted = [[batch, 69, M, C], [batch, Q, M, 2, 4, 2], [batch, Q, M, 2, 4]]
    assert [shapes[node.input[index]] for index in (0, 3, 4)] == wanted


def inferred(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    found = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return [*found.input, *found.value_info]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A quantized network with deformable convolutions, for TensorRT 8.6 or not."""
    torch.manual_seed(0)
    backbone = BackboneConfig(depths=(1, 1, 1), width=8, out_stages=(1, 2), style="caffe", deformable_stages=(2,))
    config = exported_network(backbone=backbone, decoder_layers=1)
    model = BEVFormer(config.model)
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            torch.nn.init.normal_(module.offset.weight, std=0.05)
    model = quantized(config, model).eval()
    frames = noise_frames(DATA, model.config.num_cameras, IMAGE_HW)
    calibrate_on_noise(model)
    folder, traced = tmp_path_factory.mktemp("export"), trace(model, IMAGE_HW)
    parent = Seal(kind="student", config=to_dict(config), parent=None, facts=StudentFacts(), provenance={}, sha256="student")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "trace", lambda model, image_hw: traced.clone())
        for builtin in (False, True):
            rows, _ = to_onnx.export(model, parent, folder / "net.onnx", IMAGE_HW, frames, builtin_plugin=builtin)
            made[builtin] = onnx.load(folder / "net.onnx"), rows
    return made


def test_the_whole_network_computes_what_pytorch_computes(exports: Exports) -> None:
    _, rows = exports[True]
    assert all(row.passed for row in rows), parity.table(rows)
    for row, usual in zip(rows, exports[False][1], strict=True):
        assert row.cosine == pytest.approx(usual.cosine, abs=1e-4)


def test_tensorrt_8_can_read_the_file(exports: Exports) -> None:
    model, _ = exports[True]
    trt86_check.check(model, PLUGINS)
    deployed_graph.check(Path("net.onnx"), model, INTERFACE, PLUGINS)
    assert (model.ir_version, len(model.functions)) == (8, 0)
    assert {"Shape", "Constant", "Range"}.isdisjoint(node.op_type for node in model.graph.node)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (constants[name] for name in node.input[1:])
            assert (zero.dtype, zero.shape, zero.any()) == (np.int8, scale.shape, np.False_), node.name
            assert node.op_type == "QuantizeLinear" or node.input[0] not in constants, node.name


def test_the_usual_file_is_refused_with_the_option_that_helps(exports: Exports) -> None:
    with pytest.raises(EngineError, match="of operator set 18; .* Export it with --builtin-plugin, or build with TensorRT 10"):
        trt86_check.check(exports[False][0], PLUGINS)


def test_the_same_layers_are_quantized(exports: Exports) -> None:
    found = [onnx_products.products(model, INTERFACE.geometry) for model, _ in exports.values()]
    roles = [{product.name: (product.role, product.problem) for product in products} for products in found]
    assert roles[0] == roles[1]
    assert ("quantized", "") in roles[0].values()


@pytest.mark.parametrize("other", ["float16", "standard_deform_conv"])
def test_another_form_at_the_same_time_is_refused(other: str, tmp_path: Path) -> None:
    config = exported_network()
    parent = Seal(kind="teacher", config=to_dict(config), parent=None, facts=TeacherFacts(), provenance={}, sha256="teacher")
    with pytest.raises(ValueError, match="--builtin-plugin goes with neither --float16, .* leave them out"):
        to_onnx.export(BEVFormer(config.model), parent, tmp_path / "x.onnx", IMAGE_HW, (), builtin_plugin=True, **{other: True})
    assert not list(tmp_path.iterdir())
