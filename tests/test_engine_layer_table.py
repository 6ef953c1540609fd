"""Layer tables are read from TensorRT-RTX's log message and EngineInspector's JSON, and audited against an ONNX."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine import audit, layer_table, onnx_products
from engine.backend import EngineError
from engine.layer_table import Layer
from engine.onnx_products import Product

# TensorRT-RTX 1.7.1.116 on a drawn model: Q -> two convolutions on parallel streams, one name with commas and brackets; tensors shortened.
RECORDED = """Layers:
Name: __myl_MulMinMaxRounCast_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,8,4,4], Strides: [128,16,4,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ { Name: c0, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Half, Format: (Linear) Row major linear format }], Outputs: [ { Name: t0, Dimensions: [1,8,4,4], Strides: [128,1,32,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], TacticName: __myl_MulMinMaxRounCast_0x57, StreamId: 0, Metadata: [ONNX Layer: /in, Inputs: [y]_q]
Name: __mye502_myl0_1, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, EventId: 1, Metadata: 
Name: c1_myl0_2, LayerType: correlation, Inputs: [ { Name: t0, Dimensions: [1,8,4,4], Strides: [128,1,32,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: [8,8,3,3], Strides: [72,1,24,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }, { Name: s, Dimensions: [1,8,1,1], Strides: [8,1,8,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], Outputs: [ { Name: t1, Dimensions: [1,8,4,4], Strides: [128,1,32,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: c1][ONNX Layer: /in, Inputs: [y]_dq][ONNX Layer: gs | encoder.msda (Sample)]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half, Dimensions: [1,8,4,4], Location: Device, IsShapeInferenceIO: false
"""  # noqa: E501, W291


def test_recorded_table_gives_names_types_and_fused_nodes() -> None:
    quantize, signal, conv = layer_table.from_log(RECORDED)
    assert quantize == layer_table.Layer(
        name="__myl_MulMinMaxRounCast_myl0_0",
        kind="kgen",
        inputs=("FP16",),
        constants=("FP16",),
        outputs=("INT8",),
        tactic="__myl_MulMinMaxRounCast_0x57",
        nodes=("/in, Inputs: [y]_q",),
    )
    assert not signal.is_kernel
    assert (conv.inputs, conv.constants, conv.outputs) == (("INT8",), ("INT8", "FP32"), ("FP32",))
    assert conv.nodes == ("c1", "/in, Inputs: [y]_dq", "gs | encoder.msda (Sample)")


def test_stream_synchronisation_is_no_kernel_and_quantize_is_a_requantization() -> None:
    report = audit.audit([], layer_table.from_log(RECORDED))
    assert (report.kernels, report.int8_kernels, report.requantizations) == (2, 1, 1)


def test_a_table_of_another_form_is_refused_not_misread() -> None:
    with pytest.raises(EngineError, match="cannot be read: 'Name: c1, Type: conv'"):
        layer_table.from_log("Layers:\nName: c1, Type: conv\n")
    with pytest.raises(EngineError, match="no rows"):
        layer_table.from_log("Layers:\n")


@pytest.mark.parametrize(
    ("input_type", "weights"),
    [
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, {"Weights": {"Type": "Int8", "Count": 9}}),
        (
            {"Format": "Row major linear", "Datatype": "Int8"},
            {"Constants": [{"Name": "w", "Format": "Row major linear", "Datatype": "Int8"}]},
        ),
    ],
    ids=["tensorrt10", "tensorrt11"],
)
def test_inspector_json_of_both_generations_is_read(input_type: dict[str, str], weights: dict[str, object]) -> None:
    row = {
        "Name": "c1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 8, 4, 4], **input_type}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 8, 4, 4], "Format/Datatype": "Row major linear FP16 format"}],
        "TacticName": "sm80_xmma_fprop_i8i8",
        "Metadata": "[ONNX Layer: c1]\x1e[ONNX Layer: relu]",
        **weights,
    }
    (layer,) = layer_table.from_inspector(json.dumps({"Layers": [row]}))
    assert (layer.inputs, layer.constants, layer.outputs) == (("INT8",), ("INT8",), ("FP16",))
    assert layer.nodes == ("c1", "relu")
    assert audit.is_integer_product(layer)


def test_inspector_json_with_names_only_is_refused() -> None:
    with pytest.raises(EngineError, match="names only"):
        layer_table.from_inspector(json.dumps({"Layers": ["c1", "c2"]}))


@pytest.mark.parametrize(
    ("kind", "inputs", "constants"),
    [
        ("runtime_fusion", ("INT8",), ("FP32", "FP32", "INT8")),
        ("correlation", ("FP32", "FP32"), ("FP32", "FP32")),
        ("gemm", ("FP16",), ("INT8", "FP32")),
        ("kgen", ("INT8", "INT8"), ()),
    ],
)
def test_a_kernel_that_converts_int8_to_float_is_no_integer_product(kind: str, inputs: tuple[str, ...], constants: tuple[str, ...]) -> None:
    layer = layer_table.Layer(name="l", kind=kind, inputs=inputs, constants=constants, outputs=("FP32",), tactic="", nodes=("l",))
    assert not audit.is_integer_product(layer)


def test_a_product_of_two_constants_or_with_a_fused_residual_is_an_integer_product() -> None:
    for inputs, constants in (((), ("INT8", "INT8", "FP32")), (("INT8", "FP16"), ("INT8", "FP32")), (("INT8", "INT8"), ("FP32",))):
        layer = layer_table.Layer(name="l", kind="gemm", inputs=inputs, constants=constants, outputs=("FP32",), tactic="", nodes=("l",))
        assert audit.is_integer_product(layer)


def products_of(nodes: list[onnx.NodeProto], inputs: dict[str, list[int | str]], **constants: np.ndarray) -> list[Product]:
    """Products of a drawn graph with inputs of these shapes."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    result = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    drawn = helper.make_graph(nodes, "drawing", tensors, [result], [numpy_helper.from_array(np.array(v), k) for k, v in constants.items()])
    model = helper.make_model(drawn, opset_imports=[helper.make_opsetid("", 18)])
    return onnx_products.products(model, ("lidar2img",))


def quantized(x: str, name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [x, "scale", "zero"], [f"{name}.int8"]),
        helper.make_node("DequantizeLinear", [f"{name}.int8", "scale", "zero"], [name]),
    ]


def kernel(*nodes: str, kind: str = "gemm", inputs: tuple[str, ...] = ("INT8",), constants: tuple[str, ...] = ("INT8", "FP32")) -> Layer:
    return Layer(name=f"kernel of {nodes[0]}", kind=kind, inputs=inputs, constants=constants, outputs=("FP32",), tactic="", nodes=nodes)


@pytest.fixture
def drawn() -> list[Product]:
    """One product of each role, with 4096 operations quantized, 2048 float by policy, 128 geometry and 64 constant."""
    nodes = [
        *quantized("prev_bev", "x"),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["weight"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"], name="integer"),
        helper.make_node("MatMul", ["y", "v"], ["z"], name="plain"),
        helper.make_node("Einsum", ["lidar2img", "points"], ["place"], name="projection", equation="bij,kj->bki"),
        helper.make_node("Gemm", ["v", "narrow"], ["fixed"], name="table", transA=1, transB=1),
        helper.make_node("Sum", ["z", "place", "fixed"], ["out"]),
    ]
    constants = {"scale": np.float32(0.1), "zero": np.int8(0), "w": np.ones((8, 8), np.int8), "v": np.ones((8, 4), np.float32)}
    constants |= {"points": np.ones((4, 4), np.float32), "narrow": np.ones((1, 8), np.float32)}
    return products_of(nodes, {"prev_bev": [2, 16, 8], "lidar2img": [1, 4, 4]}, **constants)


def test_operations_and_roles_of_products_come_from_the_onnx(drawn: list[Product]) -> None:
    assert [(product.name, product.op, product.role, product.flops) for product in drawn] == [
        ("integer", "MatMul", "quantized", 2 * 2 * 16 * 8 * 8),
        ("plain", "MatMul", "policy", 2 * 2 * 16 * 8 * 4),
        ("projection", "Einsum", "geometry", 2 * 4 * 4 * 4),
        ("table", "Gemm", "constant", 2 * 4 * 8),
    ]
    (conv,) = products_of(
        [helper.make_node("Conv", ["images", "w"], ["y"], name="c", group=2, strides=[2, 2], pads=[1, 1, 1, 1])],
        {"images": [3, 4, 10, 20]},
        w=np.ones((8, 2, 3, 3), np.float32),
    )
    assert conv.flops == 2 * (3 * 8 * 5 * 10) * (2 * 3 * 3)


def test_every_float_product_is_listed_with_its_precision_and_reason(drawn: list[Product], tmp_path: Path) -> None:
    table = [kernel("integer"), kernel("plain", inputs=("FP16",), constants=("FP16",)), kernel("projection", kind="kgen", inputs=("FP32",))]
    report = audit.audit(drawn, table)
    audit.require_int8(report)
    facts = report.facts()
    assert facts["float_layers"] == [
        {"name": "plain", "op": "MatMul", "flops": 2048, "precision": "FP16", "reason": "policy: the ONNX gives it float operands"},
        {
            "name": "projection",
            "op": "Einsum",
            "flops": 128,
            "precision": "FP32",
            "reason": "geometry: depends on calibration and motion alone",
        },
        {"name": "table", "op": "Gemm", "flops": 64, "precision": "absent", "reason": "constant: depends on no input"},
    ]
    assert (facts["quantized_layers"], facts["int8_layers"], facts["int8_flops"], facts["float_flops"]) == (1, 1, 4096, 2240)
    assert facts["int8_flops_fraction"] == pytest.approx(4096 / (4096 + 2048 + 64))
    audit.save(tmp_path / "a.json", report)
    assert {row["name"]: row["wanted"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]} == {
        "integer": "INT8",
        "plain": "float",
        "projection": "float",
        "table": "float",
    }


def test_a_layer_that_fell_back_counts_as_float_and_is_told_from_those_meant_to_be(drawn: list[Product]) -> None:
    report = audit.audit(drawn, [kernel("integer", kind="kgen"), kernel("plain", inputs=("FP32",))])
    first, *others = report.facts()["float_layers"]
    assert (first["name"], first["precision"]) == ("integer", "FP32")
    assert first["reason"] == "fell back: TensorRT chose kernel kgen on INT8, INT8, FP32"
    assert not [layer for layer in others if layer["reason"].startswith("fell back")]
    assert report.int8_flops_fraction == 0
    with pytest.raises(EngineError, match=r"1 quantized layers silently run in float:\n  integer \(MatMul\): FP32"):
        audit.require_int8(report)


def test_a_product_of_unknown_size_is_refused() -> None:
    with pytest.raises(EngineError, match="the shape of y is not fixed in the ONNX"):
        products_of([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], {"x": ["batch", 4]}, w=np.ones((4, 2), np.float32))
