"""The TensorRT plugins under NVIDIA's own code for Python plugins: registration, types, shapes, kernels, launches, and what a failure says.

That code is the module tensorrt.plugin. Full TensorRT is large and of no use without a GPU, but the bindings of its lean runtime bring the
same module. What these have not got, as they build no engine, is stood in for: the names TensorFormat and ITensor, the formats in tensor
descriptions, and the builder's symbolic sizes, here numbers.
"""

import enum
import importlib
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from engine import backend, build
from engine.backend import Backend, Gpu
from plugins import tensorrt_ops
from plugins.nvrtc import CompileError
from plugins.variant import TYPES, Variant, VariantError, of_recipe
from qdbev import schema
from qdbev.ops import contract
from qdbev.recipes import RECIPES

INPUTS = {name: operator.inputs for name, operator in contract.OPERATORS.items()}
ATTRIBUTES = {name: operator.attributes for name, operator in contract.OPERATORS.items()}
PLUGIN = contract.PLUGIN_ATTRIBUTES

VARIANTS = [variant for recipe in ("micro", "base") for variant in of_recipe(RECIPES[recipe]())]
SMALL = [variant for variant in VARIANTS if variant.num_keys < 1000]
NAMES = {"multi_scale_deformable_attention": "MultiScaleDeformableAttention", "spatial_cross_attention": "SpatialCrossAttention"}


class TensorFormat(enum.Enum):
    LINEAR = 0


@pytest.fixture(scope="module")
def trt() -> Iterator[ModuleType]:
    """What takes the place of the module tensorrt, with our plugins for sm_90."""
    lean = pytest.importorskip("tensorrt_lean_bindings", reason="needs the lean runtime: pip install -r requirements.txt")
    module = ModuleType("tensorrt")
    module.__dict__.update({name: value for name, value in vars(lean).items() if not name.startswith("__")})
    module.TensorFormat, module.ITensor = TensorFormat, type("ITensor", (), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", module)
        module.plugin = importlib.import_module("tensorrt_lean_bindings.plugin")
        patch.setitem(sys.modules, "tensorrt.plugin", module.plugin)
        tensorrt_ops.register("sm_90")
        yield module


@pytest.fixture
def failures(trt) -> list[str]:
    found = tensorrt_ops.register("sm_90")
    found.clear()
    return found


def name_of(variant: Variant) -> str:
    return NAMES[variant.op] + "Int8" * (variant.value == "int8")


def shapes_of(variant: Variant, batch: int = 1, num_query: int = 2500, num_cameras: int = 6) -> dict[str, tuple[int, ...]]:
    """Of the inputs, by name."""
    spatial = variant.op == "spatial_cross_attention"
    cameras, pillars = ((num_cameras,), (variant.num_pillar_points,)) if spatial else ((), ())
    samples = (batch, num_query, variant.num_heads, len(variant.level_hw), variant.num_points)
    found = {
        "value": (batch, *cameras, variant.num_keys, variant.num_heads, variant.channels),
        "value_scale": (),
        "reference_points": (batch, *cameras, num_query, *pillars, 2),
        "visible": (batch, *cameras, num_query),
        "sampling_offsets": (*samples, 2),
        "attention_logits": samples,
    }
    return {name: found[name] for name in INPUTS[name_of(variant)]}


class Instance:
    """A plugin as the parser makes it, driven through the steps of a build."""

    def __init__(self, trt: ModuleType, variant: Variant, shapes: dict[str, tuple[int, ...]]) -> None:
        self.trt = trt
        number = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "int8": trt.DataType.INT8}
        first = {"value": number[variant.value], "value_scale": number[variant.out]}
        self.shapes, self.types = shapes, [first.get(name, trt.DataType.FLOAT) for name in shapes]
        self.level_hw = np.array(variant.level_hw, np.int32).flatten()
        field = trt.PluginField("level_hw", self.level_hw, trt.PluginFieldType.INT32)
        creator = trt.get_plugin_registry().get_creator(name_of(variant), "1", "qdbev")
        request = trt.QuickPluginCreationRequest.UNKNOWN
        fields = trt.PluginFieldCollection([field])
        self.plugin = creator.create_plugin(name_of(variant), "qdbev", fields, trt.TensorRTPhase.BUILD, request)

    def output_types(self) -> list[Any]:
        return self.plugin.get_output_data_types(self.types, [len(shape) for shape in self.shapes.values()])

    def output_shape(self) -> list[int]:
        self.output_types()
        self.plugin.get_output_shapes([[_size(self.trt, s) for s in shape] for shape in self.shapes.values()], [], _builder(self.trt))
        return [size.constant_value() for size in self.plugin.output_descs[0].shape_expr]

    def launch(self) -> tuple[Any, list[Any], str, bytes]:
        """Launch parameters, int32 arguments, and the kernel."""
        out = self.output_shape()
        described = zip([*self.shapes.values(), out], [*self.types, *self.output_types()], strict=True)
        given = [_described(self.trt, shape, dtype) for shape, dtype in described]
        self.plugin.set_tactic(0)
        parameters, numbers = SimpleNamespace(), Numbers()
        self.plugin.get_launch_params([], given, len(self.shapes), parameters, numbers, _builder(self.trt))
        return parameters, numbers, *self.plugin.get_kernel([d.desc for d in given[:-1]], [given[-1].desc])


class Numbers(dict[int, Any]):
    """What receives the kernel's int32 arguments."""

    nbSymExprs = 0  # noqa: N815


def _size(trt: ModuleType, number: int) -> Any:
    """A symbolic size that is a number; TensorRT's own come from its builder only."""

    class Size(trt.IDimensionExpr):
        def is_constant(self) -> bool:
            return True

        def get_constant_value(self) -> int:
            return number

    return Size.__new__(Size)


def _builder(trt: ModuleType) -> Any:
    class ExprBuilder(trt.IExprBuilder):
        def constant(self, number: int) -> Any:
            return _size(trt, number)

        def operation(self, operation: Any, first: Any, second: Any) -> Any:
            assert operation == trt.DimensionOperation.PROD
            return _size(trt, first.get_constant_value() * second.get_constant_value())

    return ExprBuilder()


def _described(trt: ModuleType, shape: Sequence[int], dtype: Any) -> Any:
    class Described(trt.DynamicPluginTensorDesc):
        desc = SimpleNamespace(dims=trt.Dims(shape), type=dtype, format=trt.TensorFormat.LINEAR, scale=-1.0)

    return Described()


def numbers_of(symbols: Any) -> list[int]:
    """Their values; `constant_value` of SymInt32 fails in 11.4."""
    return [symbol._expr.get_constant_value() for symbol in symbols]


@pytest.fixture
def launches(trt, monkeypatch) -> list[tuple[list[int], list[int], list[int]]]:
    """Grids, blocks and int32 arguments as our function gives them, numbers: TensorRT's own objects for them can only be written to."""
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
    """Bytes of each of the kernel's parameters, from the entries 0x17 of the cubin's section .nv.info."""
    found = re.findall(rb"\x04\x17\x0c\x00.{4}(..)..(.{4})", code, re.DOTALL)
    sizes = {struct.unpack("<H", ordinal)[0]: struct.unpack("<I", size)[0] >> 18 for ordinal, size in found}
    return [sizes[ordinal] for ordinal in range(len(sizes))]


def test_the_plugins_are_registered_as_the_nodes_of_the_graph_name_them(trt):
    tensorrt_ops.register("sm_90")
    registered = {(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in trt.get_plugin_registry().all_creators}
    nodes = {name for name, attributes in ATTRIBUTES.items() if "level_hw" in attributes}
    version, namespace = PLUGIN["plugin_version"], PLUGIN["plugin_namespace"]
    assert {(name, version, namespace) for name in nodes} == {key for key in registered if key[2] == "qdbev"}
    assert set(tensorrt_ops.PLUGINS) == nodes and len(nodes) == 4


@pytest.mark.parametrize("name", tensorrt_ops.PLUGINS)
def test_inputs_and_attributes_are_those_of_the_exported_operator(trt, name):
    definition = trt.plugin._lib.QDP_REGISTRY[f"qdbev::{name}"]
    assert tuple(definition.input_tensor_names) == INPUTS[name]
    assert list(definition.input_attrs) == list(ATTRIBUTES[name])
    assert definition.num_outputs == 1
    assert definition.autotune_func and definition.aot_impl_func and definition.impl_func is None


@pytest.mark.parametrize("name", tensorrt_ops.PLUGINS)
def test_every_pair_of_types_that_has_a_kernel_is_offered_and_no_other(trt, name):
    numbers = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.INT8: "int8"}
    inputs, found = INPUTS[name], set()
    for offered in trt.plugin._lib.QDP_REGISTRY[f"qdbev::{name}"].autotune_func(*inputs, None):
        for combination in offered._get_combinations():
            types = dict(zip((*inputs, "out"), (numbers[dtype] for dtype in combination.types), strict=True))
            found.add((types.pop("value"), types.pop("out")))
            assert types.pop("value_scale", None) in (None, numbers[combination.types[-1]])
            assert set(types.values()) == {"float32"}
            assert set(combination.layouts) == {trt.TensorFormat.LINEAR}
    assert found == {types for types in TYPES if (types[0] == "int8") == name.endswith("Int8")}


@pytest.mark.parametrize("variant", SMALL)
def test_the_output_has_the_type_of_its_scale_or_else_of_its_value(trt, variant):
    wanted = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF}[variant.out]
    assert Instance(trt, variant, shapes_of(variant)).output_types() == [wanted]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_has_a_row_of_all_heads_for_each_query(trt, variant):
    shapes = shapes_of(variant, batch=3, num_query=77)
    assert Instance(trt, variant, shapes).output_shape() == [3, 77, variant.num_heads * variant.channels]


@pytest.mark.parametrize("variant", SMALL)
def test_the_kernel_that_goes_into_the_plan_takes_what_tensorrt_passes(trt, failures, variant):
    parameters, numbers, name, code = Instance(trt, variant, shapes_of(variant)).launch()
    assert name == variant.op and code[:4] == b"\x7fELF" and name.encode() + b"\0" in code
    assert kernel_parameters(code) == [*[8] * len(INPUTS[name_of(variant)]), *[4] * numbers.nbSymExprs, 8]
    assert list(numbers) == list(range(numbers.nbSymExprs)) and all(isinstance(number, trt.ISymExpr) for number in numbers.values())
    assert set(vars(parameters)) == {*(f"{what}_{axis}" for what, axis in product(("grid", "block"), "xyz")), "shared_mem"}
    assert not failures


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_launch_covers_every_query_head_and_sample(trt, launches, monkeypatch, variant):
    monkeypatch.setattr(tensorrt_ops.kernels, "cubin", lambda source, architecture: f"{architecture} {source}".encode())
    *_, code = Instance(trt, variant, shapes_of(variant, batch=2, num_query=2500, num_cameras=5)).launch()
    lanes = max(1, variant.channels * {"float32": 4, "float16": 2, "int8": 1}[variant.value] // 16)
    cameras = [5] * (variant.op == "spatial_cross_attention")
    assert launches == [([-(-2500 * lanes // 256), variant.num_heads, 2], [256, 1, 1], [2500, *cameras, 50])]
    assert code == f"sm_90 {variant.source()}".encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": (1, 6, 300, 4, 12)}, "12 channels a head in int8: kernels exist for powers of two"),
        ({"value": (1, 6, 299, 4, 16)}, r"value is \(1, 6, 299, 4, 16\), must be \(1, 6, 300, 4, 16\)"),
        ({"value_scale": (4,)}, r"value_scale is \(4,\), must be one number"),
        ({"visible": (1, 6, -1)}, r"visible is \(1, 6, -1\): -1 is a size left open until the engine runs; export the ONNX with fixed"),
    ],
)
def test_sizes_without_a_kernel_end_the_build_and_the_reason_is_kept(trt, failures, change, words):
    variant = Variant(
        op="spatial_cross_attention", value="int8", out="float32",
        num_heads=4, channels=16, num_points=8, num_pillar_points=4, level_hw=((12, 20), (6, 10)),
    )  # fmt: skip
    with pytest.raises(VariantError, match=words):
        Instance(trt, variant, shapes_of(variant) | change).launch()
    assert len(failures) == 1 and re.search(f"^SpatialCrossAttentionInt8: {words}", failures[0])


def test_a_kernel_that_cannot_be_compiled_ends_the_build_and_the_reason_is_kept(trt, failures, monkeypatch):
    def refuse(*_: object) -> None:
        raise CompileError("NVRTC cannot be loaded")

    monkeypatch.setattr(tensorrt_ops.kernels, "cubin", refuse)
    with pytest.raises(CompileError):
        Instance(trt, SMALL[0], shapes_of(SMALL[0])).launch()
    assert failures == ["SpatialCrossAttention: NVRTC cannot be loaded"]


def test_the_builder_registers_them_for_its_gpu_with_tensorrt_alone(trt, monkeypatch):
    monkeypatch.setattr(backend, "gpu", lambda: Gpu(name="H200", compute_capability="9.0", bus_id=""))
    monkeypatch.setattr(backend, "load_builtin_plugins", lambda chosen: None)  # the lean runtime has none
    asked = []
    monkeypatch.setattr(tensorrt_ops, "register", lambda architecture: asked.append(architecture) or [])
    found = build._plugins(Backend("tensorrt", trt, "11.4.0.106"))
    assert asked == ["sm_90"] and ("SpatialCrossAttentionInt8", "1", "qdbev") in found
    older = ModuleType("tensorrt")  # 10.8: no kernels made ahead of time
    older.get_plugin_registry = trt.get_plugin_registry
    build._plugins(Backend("tensorrt", older, "10.8.0.43"))
    assert build._plugins(Backend("tensorrt-rtx", trt, "1.7.1")) == frozenset() and asked == ["sm_90"]


def test_the_seal_names_the_operators_that_are_plugins_in_the_engine():
    attributes = {"domain": schema.OP_DOMAIN, **PLUGIN}
    nodes = [
        helper.make_node("SpatialCrossAttentionInt8", ["x"], ["a"], level_hw=[1, 2], **attributes),
        helper.make_node("ModulatedDeformableIm2col", ["a"], ["b"], stride=1, **attributes),
        helper.make_node("ScatterND", ["b"], ["c"]),  # a standard operator; TensorRT 8.6 has a plugin of that name, too
    ]
    model = onnx.ModelProto(graph=helper.make_graph(nodes, "g", [], []))
    registered = frozenset({("SpatialCrossAttentionInt8", "1", "qdbev"), ("SpatialCrossAttention", "1", "qdbev"), ("ScatterND", "1", "")})
    assert build.plugin_nodes(model, registered) == ["SpatialCrossAttentionInt8"]
    assert build.plugin_nodes(model, frozenset()) == []
