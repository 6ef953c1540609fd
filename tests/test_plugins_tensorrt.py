"""Test the TensorRT plugins under NVIDIA's own code for Python plugins: registration, types, shapes, kernels, launches, error reports."""

import re
import struct
from collections.abc import Iterator
from itertools import product
from types import ModuleType
from typing import Any

import onnx
import pytest
from lean_tensorrt import Instance, lean_tensorrt, numbers_of
from onnx import helper

from bench.kernel_build import variants
from engine import backend, build, build_tensorrt
from engine.backend import Backend, Gpu
from plugins import nvrtc, tensorrt_ops
from plugins.attention.cases import level_attribute
from plugins.attention.variant import TYPES, Variant
from plugins.kernel import KernelError
from plugins.nvrtc import CompileError
from plugins.operators import KERNELS
from qdbev.ops.contract import DOMAIN, OPERATORS, PLUGIN_ATTRIBUTES, SCA, Operator
from qdbev.recipes import RECIPES

VARIANTS = [variant for recipe in ("micro", "base") for variant in variants(RECIPES[recipe]())]
SMALL = [variant for variant in VARIANTS if variant.num_keys < 1000]


@pytest.fixture(scope="module")
def trt() -> Iterator[ModuleType]:
    """The module in the place of `tensorrt`, with our plugins registered for sm_90."""
    with lean_tensorrt() as module:
        tensorrt_ops.register("sm_90")
        yield module


@pytest.fixture
def failures(trt) -> list[str]:
    found = tensorrt_ops.register("sm_90")
    found.clear()
    return found


def shapes_of(variant: Variant, batch: int = 1, num_query: int = 2500, num_cameras: int = 6) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input by name."""
    cameras, pillars = ((num_cameras,), (variant.num_pillar_points,)) if variant.spatial else ((), ())
    samples = (batch, num_query, variant.num_heads, len(variant.level_hw), variant.num_points)
    found = {
        "value": (batch, *cameras, variant.num_keys, variant.num_heads, variant.channels),
        "value_scale": (),
        "reference_points": (batch, *cameras, num_query, *pillars, 2),
        "visible": (batch, *cameras, num_query),
        "sampling_offsets": (*samples, 2),
        "attention_logits": samples,
    }
    return {name: found[name] for name in variant.form.inputs}


def instance(trt: ModuleType, variant: Variant, shapes: dict[str, tuple[int, ...]]) -> Instance:
    """Return the plugin of a kernel's operator, with inputs of the kernel's types."""
    number = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "int8": trt.DataType.INT8}
    types = {"value": number[variant.value], "value_scale": number[variant.out]}
    return Instance(trt, variant.form, shapes, types, level_attribute(variant))


@pytest.fixture
def launches(trt, monkeypatch) -> list[tuple[list[int], list[int], list[int]]]:
    """Record grids, blocks and int32 arguments as numbers when our code returns them; TensorRT's own objects for them cannot be read."""
    seen = []
    for definition in trt.plugin._lib.QDP_REGISTRY.values():

        def passing(*given: Any, ours: Any = definition.aot_impl_func) -> Any:
            name, code, launch, arguments = ours(*given)
            grid, block = ([getattr(launch, f"{what}_{axis}") for axis in "xyz"] for what in ("grid", "block"))
            seen.append((numbers_of(grid), numbers_of(block), numbers_of(arguments)))
            return name, code, launch, arguments

        monkeypatch.setattr(definition, "aot_impl_func", passing)
    return seen


def kernel_parameters(code: bytes) -> list[int]:
    """Return the size of each kernel parameter in bytes, from the entries 0x17 of the cubin's section .nv.info."""
    found = re.findall(rb"\x04\x17\x0c\x00.{4}(..)..(.{4})", code, re.DOTALL)
    sizes = {struct.unpack("<H", ordinal)[0]: struct.unpack("<I", size)[0] >> 18 for ordinal, size in found}
    return [sizes[ordinal] for ordinal in range(len(sizes))]


def test_the_plugins_are_registered_as_the_nodes_of_the_graph_name_them(trt):
    tensorrt_ops.register("sm_90")
    registered = {(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in trt.get_plugin_registry().all_creators}
    version, namespace = PLUGIN_ATTRIBUTES["plugin_version"], PLUGIN_ATTRIBUTES["plugin_namespace"]
    names = {operator.name for operator in OPERATORS.values() if "level_hw" in operator.attributes}
    assert {(name, version, namespace) for name in names} == {key for key in registered if key[2] == "qdbev"}
    assert {operator.name for operator in KERNELS} == names and len(names) == 4


@pytest.mark.parametrize("operator", KERNELS, ids=lambda operator: operator.name)
def test_inputs_and_attributes_are_those_of_the_contract(trt, operator):
    definition = trt.plugin._lib.QDP_REGISTRY[f"qdbev::{operator.name}"]
    assert tuple(definition.input_tensor_names) == operator.inputs
    assert list(definition.input_attrs) == list(operator.attributes)
    assert definition.num_outputs == 1
    assert definition.autotune_func and definition.aot_impl_func and definition.impl_func is None


@pytest.mark.parametrize("operator", KERNELS, ids=lambda operator: operator.name)
def test_every_pair_of_types_that_has_a_kernel_is_offered_and_no_other(trt, operator: Operator):
    numbers = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.INT8: "int8"}
    inputs, found = operator.inputs, set()
    for offered in trt.plugin._lib.QDP_REGISTRY[f"qdbev::{operator.name}"].autotune_func(*inputs, None):
        for combination in offered._get_combinations():
            types = dict(zip((*inputs, "out"), (numbers[dtype] for dtype in combination.types), strict=True))
            found.add((types.pop("value"), types.pop("out")))
            assert types.pop("value_scale", None) in (None, numbers[combination.types[-1]])
            assert set(types.values()) == {"float32"}
            assert set(combination.layouts) == {trt.TensorFormat.LINEAR}
    assert found == {types for types in TYPES if (types[0] == "int8") == operator.name.endswith("Int8")}


@pytest.mark.parametrize("variant", SMALL)
def test_the_output_has_the_type_of_its_scale_or_else_of_its_value(trt, variant):
    wanted = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF}[variant.out]
    assert instance(trt, variant, shapes_of(variant)).output_types() == [wanted]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_has_a_row_of_all_heads_for_each_query(trt, variant):
    shapes = shapes_of(variant, batch=3, num_query=77)
    assert instance(trt, variant, shapes).output_shape() == [3, 77, variant.num_heads * variant.channels]


@pytest.mark.parametrize("variant", SMALL)
def test_the_kernel_that_goes_into_the_plan_takes_what_tensorrt_passes(trt, failures, variant):
    parameters, numbers, name, code = instance(trt, variant, shapes_of(variant)).launch()
    assert name == variant.entry and code[:4] == b"\x7fELF" and name.encode() + b"\0" in code
    assert kernel_parameters(code) == [*[8] * len(variant.form.inputs), *[4] * numbers.nbSymExprs, 8]
    assert list(numbers) == list(range(numbers.nbSymExprs)) and all(isinstance(number, trt.ISymExpr) for number in numbers.values())
    assert set(vars(parameters)) == {*(f"{what}_{axis}" for what, axis in product(("grid", "block"), "xyz")), "shared_mem"}
    assert not failures


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_launch_covers_every_query_head_and_sample(trt, launches, monkeypatch, variant):
    monkeypatch.setattr(nvrtc, "cubin", lambda source, architecture: f"{architecture} {source}".encode())
    *_, code = instance(trt, variant, shapes_of(variant, batch=2, num_query=2500, num_cameras=5)).launch()
    lanes = max(1, variant.channels * {"float32": 4, "float16": 2, "int8": 1}[variant.value] // 16)
    cameras = [5] * variant.spatial
    assert launches == [([-(-2500 * lanes // 256), variant.num_heads, 2], [256, 1, 1], [2500, *cameras, 50])]
    assert code == f"sm_90 {variant.source()}".encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": (1, 6, 300, 4, 12)}, "12 channels per head in int8: kernels exist for powers of two"),
        ({"value": (1, 6, 299, 4, 16)}, r"value is \(1, 6, 299, 4, 16\), must be \(1, 6, 300, 4, 16\)"),
        ({"value_scale": (4,)}, r"value_scale is \(4,\), must be one number"),
        (
            {"visible": (1, 6, -1)},
            r"visible is \(1, 6, -1\): -1 is a size that is only known when the engine runs; export the ONNX with fixed",
        ),
    ],
)
def test_sizes_without_a_kernel_end_the_build_and_the_reason_is_kept(trt, failures, change, words):
    variant = Variant(
        operator=SCA, value="int8", out="float32",
        num_heads=4, channels=16, num_points=8, num_pillar_points=4, level_hw=((12, 20), (6, 10)),
    )  # fmt: skip
    with pytest.raises(KernelError, match=words):
        instance(trt, variant, shapes_of(variant) | change).launch()
    assert len(failures) == 1 and re.search(f"^SpatialCrossAttentionInt8: {words}", failures[0])


def test_a_kernel_that_cannot_be_compiled_ends_the_build_and_the_reason_is_kept(trt, failures, monkeypatch):
    def refuse(*_: object) -> None:
        raise CompileError("NVRTC cannot be loaded")

    monkeypatch.setattr(nvrtc, "cubin", refuse)
    with pytest.raises(CompileError):
        instance(trt, SMALL[0], shapes_of(SMALL[0])).launch()
    assert failures == ["SpatialCrossAttention: NVRTC cannot be loaded"]


def test_the_builder_registers_them_for_its_gpu_with_tensorrt_alone(trt, monkeypatch):
    monkeypatch.setattr(backend, "gpu", lambda: Gpu(name="H200", compute_capability="9.0", bus_id=""))
    asked = []
    monkeypatch.setattr(tensorrt_ops, "register", lambda architecture: asked.append(architecture) or [])
    found = build_tensorrt.plugins(Backend("tensorrt", trt, "11.4.0.106"))
    assert asked == ["sm_90"] and ("SpatialCrossAttentionInt8", "1", "qdbev") in found
    older = ModuleType("tensorrt")  # 10.8: no ahead-of-time compiled kernels
    older.get_plugin_registry = trt.get_plugin_registry
    build_tensorrt.plugins(Backend("tensorrt", older, "10.8.0.43"))
    assert build_tensorrt.plugins(Backend("tensorrt-rtx", trt, "1.7.1")) == frozenset() and asked == ["sm_90"]


def test_the_seal_names_the_operators_that_are_plugins_in_the_engine():
    attributes = {"domain": DOMAIN, **PLUGIN_ATTRIBUTES}
    nodes = [
        helper.make_node("SpatialCrossAttentionInt8", ["x"], ["a"], level_hw=[1, 2], **attributes),
        helper.make_node("ModulatedDeformableIm2col", ["a"], ["b"], stride=1, **attributes),
        helper.make_node("ScatterND", ["b"], ["c"]),  # a standard operator; TensorRT has a plugin of that name, too
    ]
    model = onnx.ModelProto(graph=helper.make_graph(nodes, "g", [], []))
    registered = frozenset({("SpatialCrossAttentionInt8", "1", "qdbev"), ("SpatialCrossAttention", "1", "qdbev"), ("ScatterND", "1", "")})
    assert build.plugin_nodes(model, registered) == ["SpatialCrossAttentionInt8"]
    assert build.plugin_nodes(model, frozenset()) == []
