"""Typing a graph as float16 keeps the right tensors in float32, and integers as integers."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_passes import apply

from engine import audit, backend, build, build_tensorrt
from engine.onnx_products import products
from export.bodies.attach import attach
from export.float16 import _to_float16, to_float16
from qdbev.ops import contract
from qdbev.schema import Interface

RNG = np.random.default_rng(0)
WIDE, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
K, M, C, P, LEVEL_HW = 12, 2, 8, 4, (3, 4)
INTERFACE = Interface(inputs={}, outputs={}, geometry=("can_bus",), coordinates=("box_code",))
"""The parts of the drawn network's interface that the pass reads."""


def node(op: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, inputs, [output], name=output, **attributes)


def quantized(x: str, name: str) -> list[NodeProto]:
    return [node("QuantizeLinear", [x, "scale", "zero"], f"{name}.int8"), node("DequantizeLinear", [f"{name}.int8", "scale", "zero"], name)]


def integer_weight(name: str) -> NodeProto:
    return node("DequantizeLinear", [f"{name}.weight", "weight_scale"], f"{name}.dequantized")


def network(integer: bool) -> onnx.ModelProto:
    """A small deformable attention: value, offsets and logits are computed from one tensor, references from the motion."""
    products = {"value": M * C, "offsets": M * P * 2, "logits": M * P, "boxes": 3}
    nodes = [
        node("Gather", ["can_bus", "first"], "motion", axis=1),  # (1, 2)
        node("Sin", ["motion"], "turned"),
        node("Add", ["cells", "turned"], "references"),  # (1, K, 2)
        *(quantized("prev_bev", "x") if integer else [node("Mul", ["prev_bev", "scale"], "x")]),
    ]
    for name in products:
        source = "bev" if name == "boxes" else "x"
        if integer and name != "boxes":
            nodes += [integer_weight(name), node("MatMul", [source, f"{name}.dequantized"], f"{name}.product")]
        else:
            nodes.append(node("MatMul", [source, f"{name}.weight"], f"{name}.product"))
        if name == "logits":
            nodes += attention()
    nodes += [node("Sigmoid", ["boxes.product"], "box_code"), node("Relu", ["bev"], "cls_logits")]
    values = {
        "cells": RNG.random((1, K, 2)),
        "scale": 0.05,
        "weight_scale": 2.0**-5,
        "boxes.weight": RNG.standard_normal((M * C, products["boxes"])),
    }
    constants = {name: np.float32(value) for name, value in values.items()} | {"zero": np.int8(0), "first": np.array([0, 1])}
    for name, size in list(products.items())[:3]:
        drawn = RNG.integers(-9, 9, (M * C, size))
        constants[f"{name}.weight"] = drawn.astype(np.int8) if integer else (drawn / 32).astype(np.float32)
    constants |= {f"{name}.shape": np.array(shape) for name, shape in SHAPES.items()}
    return model_of(nodes, {"prev_bev": [1, K, M * C], "can_bus": [1, 18]}, OUTPUTS, constants)


OUTPUTS = {"bev": [1, K, M * C], "cls_logits": [1, K, M * C], "box_code": [1, K, 3]}
SHAPES = {"value": (1, K, M, C), "offsets": (1, K, M, 1, P, 2), "logits": (1, K, M, 1, P)}


def attention() -> list[NodeProto]:
    shaped = [node("Reshape", [f"{name}.product", f"{name}.shape"], f"{name}.shaped") for name in SHAPES]
    inputs = ["value.shaped", "references", "offsets.shaped", "logits.shaped"]
    return [*shaped, node(contract.MSDA.name, inputs, "bev", domain=contract.DOMAIN, level_hw=LEVEL_HW, **contract.PLUGIN_ATTRIBUTES)]


def model_of(
    nodes: list[NodeProto], inputs: dict[str, list[int]], outputs: dict[str, list[int]], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    tensors = [helper.make_tensor_value_info(name, WIDE, shape) for name, shape in inputs.items()]
    results = [helper.make_tensor_value_info(name, WIDE, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(nodes, "drawing", tensors, results, [numpy_helper.from_array(np.array(v), k) for k, v in constants.items()])
    opsets = [helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    apply(model, attach)
    onnx.checker.check_model(model, full_check=True)
    return model


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Type of every tensor, after onnx has checked that they fit."""
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.output, *graph.value_info)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def operands(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Types that each node reads, by the name of the node."""
    known = types(model)
    return {node.name: [known[name] for name in node.input if name] for node in model.graph.node}


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("integer", [False, True])
def test_geometry_is_float32_and_the_rest_float16(integer: bool) -> None:
    model = network(integer)
    apply(model, to_float16, INTERFACE)
    read = operands(model)
    assert read["bev"] == [HALF, WIDE, WIDE, WIDE]
    assert [set(read[name]) for name in ("turned", "references", "box_code")] == [{WIDE}] * 3
    assert set(read["boxes.product"]) == set(read["value.product"]) == {HALF}
    assert set(read["offsets.product"]) == set(read["logits.product"]) == ({WIDE} if integer else {HALF})
    assert all(info.type.tensor_type.elem_type == WIDE for info in (*model.graph.input, *model.graph.output))


@pytest.mark.parametrize("integer", [False, True])
def test_the_numbers_are_those_of_float32_but_for_rounding(integer: bool) -> None:
    model = network(integer)
    feeds = {"prev_bev": RNG.standard_normal((1, K, M * C)).astype(np.float32), "can_bus": RNG.random((1, 18)).astype(np.float32)}
    before = run(model, feeds)
    apply(model, to_float16, INTERFACE)
    for wide, half in zip(before, run(model, feeds), strict=True):
        assert half.dtype == np.float32
        np.testing.assert_allclose(half, wide, atol=4e-3)  # two roundings to 11 bits of values up to four


def test_a_tensor_read_in_both_types_is_dequantized_in_both_and_never_cast() -> None:
    model = network(integer=True)
    apply(model, to_float16, INTERFACE)
    known = types(model)
    read = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] == "x.int8"]
    assert sorted(known[node.output[0]] for node in read) == [WIDE, HALF]
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert not [node.name for node in model.graph.node if node.op_type == "Cast" and node.input[0] in dequantized]


def test_what_is_quantized_at_once_is_not_rounded_before() -> None:
    model = network(integer=True)
    apply(model, to_float16, INTERFACE)
    assert operands(model)["x.int8"][:2] == [WIDE, WIDE]


def test_a_body_computes_in_float32() -> None:
    model = network(integer=False)
    apply(model, to_float16, INTERFACE)
    first, *_, last = model.functions[0].node
    assert (first.op_type, first.input[0], first.attribute[0].i) == ("Cast", "value", WIDE)
    assert (last.op_type, last.output[0], last.attribute[0].i) == ("Cast", model.functions[0].output[0], HALF)


@pytest.mark.parametrize(("value", "expected"), [(1e-10, 2.0**-24), (0.0, 0.0), (2.0**-20, 2.0**-20)])
def test_a_positive_constant_stays_positive(value: float, expected: float) -> None:
    assert _to_float16("scale", np.float32(value)) == np.float16(expected)


def test_a_constant_too_large_for_float16_is_named() -> None:
    model = network(integer=False)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "boxes.weight")
    weight.CopyFrom(numpy_helper.from_array(np.full((M * C, 3), 7e4, np.float32), "boxes.weight"))
    with pytest.raises(ValueError, match=r"constant boxes\.weight reaches 7e\+04, float16 ends at 65504"):
        apply(model, to_float16, INTERFACE)


def test_the_standard_deformable_convolution_is_refused() -> None:
    model = network(integer=False)
    model.graph.node[0].op_type = "DeformConv"
    with pytest.raises(ValueError, match="leave --standard-deform-conv out"):
        apply(model, to_float16, INTERFACE)


@pytest.mark.trt
def test_an_engine_multiplies_in_float16_or_int8_as_the_graph_says(tmp_path: Path) -> None:
    chosen = backend.load("tensorrt-rtx")
    for integer in (False, True):
        model, path = network(integer), tmp_path / "half.onnx"
        apply(model, to_float16, INTERFACE)
        onnx.save(model, path)
        report = audit.audit(products(model, INTERFACE.geometry), build_tensorrt.build_plan(chosen, path, build.Options()).table)
        got = {row.name.removesuffix(".product"): row.got for row in (*report.rows, *report.float_rows)}
        assert got == {"boxes": "FP16"} | dict.fromkeys(SHAPES, "INT8" if integer else "FP16")
