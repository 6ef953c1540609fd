"""A small detector, float and quantized, through the whole export."""

import copy
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graph_digest import describe
from onnx import TensorProto, numpy_helper
from onnx_passes import apply
from small_networks import DATA, IMAGE_HW, INPUTS, OUTPUTS, calibrate_on_noise, exported_network, first_inputs

from export import parity, qdq, to_onnx
from export.runner import OnnxRunner
from qdbev import artifact, detectors
from qdbev.artifact import Seal
from qdbev.config import to_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.deployed_graph import DeployedGraphError
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.facts import StudentFacts, TeacherFacts
from qdbev.ops import contract
from qdbev.quant.layers import QuantConv2d, QuantLinear, quant_layers
from qdbev.recipes import at_bits
from qdbev.restore import quantized

KINDS = ("float", "w8a8", "w4a6")
BEFORE_SEEING = {"decoder.reference_points"} | {
    f"decoder.layers.0.{name}"
    for name in (
        *(f"self_attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *(f"cross_attention.{part}" for part in ("sampling_offsets", "attention_weights")),
    )
}
"""Layers that depend on no input."""


class Exported(NamedTuple):
    kind: str
    model: BEVFormer
    parent: Seal
    path: object
    proto: onnx.ModelProto
    rows: list
    made: Seal


def small_config(kind):
    """One decoder layer, and two at W4A6."""
    return at_bits(exported_network(decoder_layers=2), "w4a6") if kind == "w4a6" else exported_network()


def small_model(kind):
    """A network with random weights, also in projections that start at zero, so that every operator has an effect."""
    torch.manual_seed(0)
    config = small_config(kind)
    model = BEVFormer(config.model).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            torch.nn.init.normal_(parameter, std=0.05)
    if kind == "float":
        return config, model
    model = quantized(config, model).eval()
    calibrate_on_noise(model, prev_bev=torch.randn(config.model.interface(IMAGE_HW).inputs["prev_bev"]).numpy())
    return config, model


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """One export of each kind, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("export"), {}

    def get(kind):
        if kind not in made:
            config, model = small_model(kind)
            parent_kind = "teacher" if kind == "float" else "student"
            parent = Seal(
                kind=parent_kind,
                config=to_dict(config),
                parent=None,
                facts=TeacherFacts() if parent_kind == "teacher" else StudentFacts(),
                provenance={},
                sha256=kind,
            )
            path = folder / f"{kind}.onnx"
            rows, seal = to_onnx.export(model, parent, path, IMAGE_HW, noise_frames(DATA, model.config.num_cameras, IMAGE_HW))
            made[kind] = Exported(kind, model, parent, path, onnx.load(path), rows, seal)
        return made[kind]

    return get


@pytest.fixture(params=KINDS)
def exported(request, exports):
    return exports(request.param)


def export_altered(exports, kind, tmp_path, monkeypatch, alter, float16=False):
    """Export again with the traced graph altered, in float16 if wanted; returns the path."""
    done = exports(kind)
    proto = copy.deepcopy(done.proto)
    alter(proto)
    monkeypatch.setattr(to_onnx, "trace", lambda model, image_hw: ir.from_proto(proto))
    path = tmp_path / "altered.onnx"
    to_onnx.export(done.model, done.parent, path, IMAGE_HW, noise_frames(DATA, done.model.config.num_cameras, IMAGE_HW), float16=float16)
    return path


def test_onnx_computes_what_pytorch_computes_on_both_frames(exported):
    assert {row.frame for row in exported.rows} == {0, 1}
    assert len(exported.rows) == 2 * len(OUTPUTS)
    assert all(row.passed for row in exported.rows), parity.table(exported.rows)


def test_the_graph_has_the_names_and_shapes_of_the_schema(exported):
    graph = exported.proto.graph
    onnx.checker.check_model(exported.proto)
    assert tuple(item.name for item in graph.input) == INPUTS
    assert tuple(item.name for item in graph.output) == OUTPUTS
    shapes = {item.name: tuple(size.dim_value for size in item.type.tensor_type.shape.dim) for item in graph.input}
    assert shapes["images"] == (1, 6, 3, *IMAGE_HW)
    assert all(item.type.tensor_type.elem_type == TensorProto.FLOAT for item in (*graph.input, *graph.output))


def test_custom_operators_are_single_nodes_with_a_body_and_plugin_attributes(exported):
    nodes = {node.name: node for node in exported.proto.graph.node if node.domain == contract.DOMAIN}
    msda, sca = (op if exported.kind == "float" else contract.INTEGER_FORMS[op].name for op in (contract.MSDA.name, contract.SCA.name))
    assert {name: node.op_type for name, node in nodes.items()} == {
        "encoder.layers.0.temporal.attention": msda,
        "encoder.layers.0.spatial.attention": sca,
        **{f"decoder.layers.{layer}.cross_attention.attention": msda for layer in range(exported.model.config.decoder_layers)},
    }
    spatial = nodes["encoder.layers.0.spatial.attention"]
    assert {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in spatial.attribute} == {
        "level_hw": [16, 24, 8, 12],
        "plugin_namespace": b"qdbev",
        "plugin_version": b"1",
    }
    assert {function.name for function in exported.proto.functions} == {msda, sca}


def test_compute_nodes_carry_the_names_of_their_modules_once(exported):
    names = [node.name for node in exported.proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(names) == len(set(names))
    modules = dict(exported.model.named_modules())
    assert [name for name in names if name not in modules] == []
    unused = {name for name in modules if name.startswith("head.cls_branches.0.") and exported.model.config.decoder_layers == 2}
    leaves = {name for name, module in modules.items() if type(module) in (torch.nn.Conv2d, torch.nn.Linear, QuantConv2d, QuantLinear)}
    assert leaves - set(names) - unused == BEFORE_SEEING


def test_branches_of_earlier_decoder_layers_are_pruned(exports):
    assert not [node.name for node in exports("w4a6").proto.graph.node if node.name.startswith("head.cls_branches.0")]


def test_the_file_holds_no_paths_of_this_machine(exported):
    content = exported.path.read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content


def test_the_seal_tells_what_was_made(exported):
    facts = exported.made.facts
    assert exported.made.parent == exported.parent.sha256
    assert facts.bytes == exported.path.stat().st_size
    assert facts.opset == contract.OPSET
    assert facts.nodes == len(exported.proto.graph.node)
    assert (facts.int4_bytes is not None) == (exported.kind == "w4a6")
    assert facts.parity["bev_cosine"] > 0.99


@pytest.mark.parametrize("kind", KINDS[1:])
def test_quantized_weights_are_int8_constants_and_no_float_copy_is_left(exports, kind):
    done = exports(kind)
    constants = {tensor.name: tensor for tensor in done.proto.graph.initializer}
    sources = {node.output[0]: node for node in done.proto.graph.node}
    readers = {node.name: node for node in done.proto.graph.node}
    assert not [node.name for node in done.proto.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in constants]
    for name, layer in quant_layers(done.model):
        if not isinstance(layer, QuantConv2d | QuantLinear) or name not in readers:
            continue
        dequantize = sources[readers[name].input[1]]
        values = numpy_helper.to_array(constants[dequantize.input[0]])
        scale = numpy_helper.to_array(constants[dequantize.input[1]])
        weight, axis = layer.weight_quantizer(layer.weight).detach().numpy(), 0
        if isinstance(layer, QuantLinear):
            weight, axis = weight.T, 1
        assert dequantize.op_type == "DequantizeLinear"
        assert dequantize.attribute[0].i == axis
        assert values.dtype == np.int8
        assert np.abs(values).max() <= 2 ** (layer.weight_quantizer.num_bits - 1) - 1
        steps = scale.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
        np.testing.assert_allclose(values * steps, weight, rtol=1e-6, atol=1e-9)
        assert f"{name}.weight" not in constants


@pytest.mark.parametrize("kind", KINDS[1:])
def test_activations_are_quantized_to_int8_with_zero_point_zero_and_one_scale(exports, kind):
    graph = exports(kind).proto.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizes = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantizes
    for node in quantizes:
        assert constants[node.input[1]].ndim == 0
        assert constants[node.input[2]].dtype == np.int8
        assert constants[node.input[2]] == 0


def test_the_4_bit_form_is_smaller_comes_back_exactly_and_runs(exports):
    done = exports("w4a6")
    stored = done.path.with_suffix(".int4.onnx")
    packed = onnx.load(stored)
    assert stored.stat().st_size < done.path.stat().st_size
    deployed = qdq.unpack_int4(ir.from_proto(packed))
    to_onnx.optimize(deployed, done.model.interface(IMAGE_HW))
    assert describe(ir.to_proto(deployed), weights=True) == describe(done.proto, weights=True)
    four_bit = [tensor.name for tensor in packed.graph.initializer if tensor.data_type == TensorProto.INT4]
    assert "encoder.layers.0.ffn.linear1.weight.int8" in four_bit
    assert "backbone.conv1.weight.int8" not in four_bit
    feeds = first_inputs(done.model)
    expected, found = OnnxRunner(done.path)(feeds), OnnxRunner(stored)(feeds)
    for name in OUTPUTS:  # the projection sums in another order, and a sum at a border of two steps takes the other
        assert 1 - parity._cosine(found[name], expected[name]) < parity.QUANTIZED_TOLERANCE


def test_integer_values_change_no_number(exports, tmp_path, monkeypatch):
    done = exports("w4a6")
    floats = qdq.unpack_int4(ir.load(done.path.with_suffix(".int4.onnx")))
    with monkeypatch.context() as patch:
        patch.setattr(to_onnx, "feed_int8_values", lambda model: 0)
        to_onnx.optimize(floats, done.model.interface(IMAGE_HW))
    ir.save(floats, tmp_path / "floats.onnx")
    feeds = first_inputs(done.model)
    expected, found = OnnxRunner(tmp_path / "floats.onnx", done.model.interface(IMAGE_HW))(feeds), OnnxRunner(done.path)(feeds)
    for name in OUTPUTS:
        np.testing.assert_array_equal(found[name], expected[name])


def test_float16_is_as_far_from_pytorch_as_rounded_images_take_it(exports, tmp_path):
    done = exports("w4a6")
    half = qdq.unpack_int4(ir.load(done.path.with_suffix(".int4.onnx")))
    to_onnx.optimize(half, done.model.interface(IMAGE_HW), float16=True)
    ir.save(half, tmp_path / "half.onnx")
    frames = noise_frames(DATA, done.model.config.num_cameras, IMAGE_HW)
    rows = parity.measure(done.model, OnnxRunner(tmp_path / "half.onnx", done.model.interface(IMAGE_HW)), frames, parity.FLOAT16_CHANGE)
    for row in rows:
        assert 1 / 5 < (1 - row.cosine) / (1 - row.self_cosine) < 5, parity.table(rows)


def test_a_weight_off_its_grid_is_refused(exports):
    model = copy.deepcopy(exports("w8a8").proto)
    graph = model.graph
    quantize = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    graph.initializer.append(numpy_helper.from_array(np.full((2, 2), 0.45, np.float32), "w"))
    graph.initializer.append(numpy_helper.from_array(np.float32(1), "s"))
    quantize.input[0], quantize.input[1] = "w", "s"
    with pytest.raises(ValueError, match="weight w is up to 0.45 steps off its grid"):
        apply(model, qdq.pack_weights)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_agrees_with_pytorch_and_keeps_inputs_outputs_and_geometry(exports, kind, tmp_path, monkeypatch):
    measure, changes = parity.measure, []
    monkeypatch.setattr(parity, "measure", lambda *given: changes.append(given[3]) or measure(*given))
    path = export_altered(exports, kind, tmp_path, monkeypatch, lambda proto: None, float16=True)
    assert changes[-1] == parity.FLOAT16_CHANGE
    facts, proto = artifact.unseal(path, "onnx").facts, onnx.load(path)
    assert (facts.float16, facts.opset, exports(kind).made.facts.float16) == (True, 19, False)
    onnx.checker.check_model(proto, full_check=True)
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    known = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.output, *graph.value_info)}
    known |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {known[name] for name in (*INPUTS, *OUTPUTS)} == {TensorProto.FLOAT}
    read = {node.name: (node.op_type, [known[name] for name in node.input if name]) for node in graph.node}
    for name, (op_type, types) in read.items():
        if op_type in contract.OPERATORS:
            value = [TensorProto.FLOAT16] if kind == "float" else [TensorProto.INT8, TensorProto.FLOAT16]
            assert types == value + [TensorProto.FLOAT] * (len(types) - len(value)), name
        if name.startswith("encoder.can_bus"):
            assert set(types) == {TensorProto.FLOAT}, name
    assert set(read["encoder.layers.0.ffn.linear1"][1]) == {TensorProto.FLOAT16}
    assert not [node.name for node in graph.node if node.op_type == "Cast" and node.input[0] == "lidar2img"]


def scale_of(proto, name):
    return next(tensor for tensor in proto.graph.initializer if tensor.name == f"{name}.weight.scale")


def test_a_wrong_scale_in_one_layer_fails_parity_and_leaves_no_file(exports, tmp_path, monkeypatch):
    def alter(proto):
        tensor = scale_of(proto, "encoder.layers.0.ffn.linear2")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))

    with pytest.raises(to_onnx.ParityError, match="out of tolerance"):
        export_altered(exports, "w4a6", tmp_path, monkeypatch, alter)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_body_fails_parity_and_leaves_no_file(exports, tmp_path, monkeypatch):
    def alter(proto):
        body = next(function for function in proto.functions if function.name == contract.SCA.name)
        next(node for node in body.node if node.op_type == "Max").op_type = "Sum"

    with pytest.raises(to_onnx.ParityError, match="out of tolerance"):
        export_altered(exports, "float", tmp_path, monkeypatch, alter)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_body_is_named_and_leaves_no_file(exports, tmp_path, monkeypatch):
    with pytest.raises(DeployedGraphError, match=r"altered.onnx: node .* is a qdbev::.* without a function body"):
        export_altered(exports, "float", tmp_path, monkeypatch, lambda proto: proto.ClearField("functions"))
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_named_and_leave_no_file(exports, tmp_path, monkeypatch):
    def alter(proto):
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "neck.lateral.0.weight")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32("nan"), tensor.name))

    with pytest.raises(DeployedGraphError, match=r"altered.onnx: .* values of weight neck.lateral.0.weight are NaN"):
        export_altered(exports, "float", tmp_path, monkeypatch, alter)
    assert list(tmp_path.iterdir()) == []


def test_an_unaltered_graph_passes_the_same_way(exports, tmp_path, monkeypatch):
    path = export_altered(exports, "float", tmp_path, monkeypatch, lambda proto: None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["altered.onnx", "altered.onnx.seal.json"]
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_a_checkpoint_that_does_not_exist_is_one_error(tmp_path, monkeypatch):
    missing, target = tmp_path / "none.pt", tmp_path / "none.onnx"
    monkeypatch.setattr("sys.argv", ["to_onnx", "--checkpoint", str(missing), "--onnx", str(target)])
    with pytest.raises(SystemExit, match=f"^error: {missing} does not exist"):
        to_onnx.main()
    assert not target.exists()


def test_a_checkpoint_without_an_image_size_asks_for_it(tmp_path, monkeypatch):
    config, model = small_model("float")
    checkpoint, target = tmp_path / "teacher.pt", tmp_path / "teacher.onnx"
    artifact.save_checkpoint(checkpoint, config=to_dict(config), weights=model.state_dict(), parent=None, facts=TeacherFacts())
    monkeypatch.setattr("sys.argv", ["to_onnx", "--checkpoint", str(checkpoint), "--onnx", str(target)])
    with pytest.raises(SystemExit, match="^error: .*--image-hw 480 800"):
        to_onnx.main()
    assert not target.exists()


def test_each_side_carries_its_own_bev_to_the_second_frame():
    _, model = small_model("float")
    seen = []

    def side(inputs):
        seen.append(inputs)
        return {"bev": np.full_like(inputs["prev_bev"], 7)}

    parity._outputs(side, noise_frames(DATA, model.config.num_cameras, IMAGE_HW), detectors.stream(model.config))
    assert [float(inputs["has_prev"][0]) for inputs in seen] == [0, 1]
    assert [np.unique(inputs["prev_bev"]).tolist() for inputs in seen] == [[0], [7]]
    np.testing.assert_allclose(seen[1]["can_bus"][0, [0, 17]], [2.5, 2.0], rtol=1e-6)


def test_quantized_tolerance_follows_the_network_within_bounds():
    rng = np.random.default_rng(0)
    ours = rng.standard_normal(100_000).astype(np.float32)
    near, far, wrong = (ours + size * rng.standard_normal(ours.size).astype(np.float32) for size in (0.03, 0.08, 0.3))
    assert parity._compare(0, "bev", ours, near, ours, True).passed
    assert not parity._compare(0, "bev", ours, far, ours, True).passed
    assert parity._compare(0, "bev", ours, far, far, True).passed
    assert not parity._compare(0, "bev", ours, wrong, wrong, True).passed
    assert not parity._compare(0, "bev", ours, near, ours, False).passed
    assert not parity._compare(0, "bev", ours, ours * np.float32("nan"), ours, True).passed
