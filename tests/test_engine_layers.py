"""Reading layer tables: TensorRT-RTX's log message and EngineInspector's JSON."""

import json

import pytest

from engine import audit, layers
from engine.backend import EngineError

# TensorRT-RTX 1.7.1.116 on a drawn model: Q -> two convolutions on parallel streams, one name with commas and brackets; tensors shortened.
RECORDED = """Layers:
Name: __myl_MulMinMaxRounCast_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,8,4,4], Strides: [128,16,4,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ { Name: c0, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Half, Format: (Linear) Row major linear format }], Outputs: [ { Name: t0, Dimensions: [1,8,4,4], Strides: [128,1,32,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], TacticName: __myl_MulMinMaxRounCast_0x57, StreamId: 0, Metadata: [ONNX Layer: /in, Inputs: [y]_q]
Name: __mye502_myl0_1, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, EventId: 1, Metadata: 
Name: c1_myl0_2, LayerType: correlation, Inputs: [ { Name: t0, Dimensions: [1,8,4,4], Strides: [128,1,32,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: [8,8,3,3], Strides: [72,1,24,8], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }, { Name: s, Dimensions: [1,8,1,1], Strides: [8,1,8,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], Outputs: [ { Name: t1, Dimensions: [1,8,4,4], Strides: [128,1,32,8], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: c1][ONNX Layer: /in, Inputs: [y]_dq][ONNX Layer: gs | encoder.msda (Sample)]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half, Dimensions: [1,8,4,4], Location: Device, IsShapeInferenceIO: false
"""  # noqa: E501, W291


def test_recorded_table_gives_names_types_and_fused_nodes() -> None:
    quantize, signal, conv = layers.from_log(RECORDED)
    assert quantize == layers.Layer(
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
    report = audit.audit([], layers.from_log(RECORDED))
    assert (report.kernels, report.int8_kernels, report.requantizations) == (2, 1, 1)


def test_a_table_of_another_form_is_refused_not_misread() -> None:
    with pytest.raises(EngineError, match="cannot be read: 'Name: c1, Type: conv'"):
        layers.from_log("Layers:\nName: c1, Type: conv\n")
    with pytest.raises(EngineError, match="no rows"):
        layers.from_log("Layers:\n")


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
    (layer,) = layers.from_inspector(json.dumps({"Layers": [row]}))
    assert (layer.inputs, layer.constants, layer.outputs) == (("INT8",), ("INT8",), ("FP16",))
    assert layer.nodes == ("c1", "relu")
    assert audit.is_integer_product(layer)


def test_inspector_json_with_names_only_is_refused() -> None:
    with pytest.raises(EngineError, match="names only"):
        layers.from_inspector(json.dumps({"Layers": ["c1", "c2"]}))


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
    layer = layers.Layer(name="l", kind=kind, inputs=inputs, constants=constants, outputs=("FP32",), tactic="", nodes=("l",))
    assert not audit.is_integer_product(layer)


def test_a_product_of_two_constants_or_with_a_fused_residual_is_an_integer_product() -> None:
    for inputs, constants in (((), ("INT8", "INT8", "FP32")), (("INT8", "FP16"), ("INT8", "FP32")), (("INT8", "INT8"), ("FP32",))):
        layer = layers.Layer(name="l", kind="gemm", inputs=inputs, constants=constants, outputs=("FP32",), tactic="", nodes=("l",))
        assert audit.is_integer_product(layer)
