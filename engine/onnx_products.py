"""The ONNX file as the engine room needs it: checked at the door, and which of its products are quantized.

Every check answers a mistake with one sentence that names the node or tensor, before TensorRT sees the file.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from engine.backend import EngineError
from qdbev import schema

_COMPUTE = ("Conv", "Gemm", "MatMul", "Einsum", "DeformConv")
_GEOMETRY_INPUTS = {"lidar2img", "can_bus", "has_prev"}
"""Inputs that say where things are. What is computed from them alone stays float: numbers of mixed units, and few."""
_TRANSPARENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Cast", "Identity", "Expand", "MaxPool")
"""Nodes that move numbers without changing them: TensorRT lets a DequantizeLinear pass behind them."""
_STANDARD_DOMAINS = ("", "ai.onnx")


Role = Literal["quantized", "policy", "geometry", "constant"]
"""Why a product runs as it should: in INT8, or in float because the ONNX leaves it so, because it is geometry, or because it depends on
no input, so that the builder computes it once."""


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product. `problem` says what in the ONNX keeps a quantized one from INT8, empty where nothing does."""

    name: str
    op: str
    problem: str = ""
    role: Role = "quantized"
    flops: int = 0
    """Multiplications and additions of one frame."""


def load(path: Path) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        EngineError: It is missing, empty, damaged or no ONNX.
    """
    if not path.is_file():
        raise EngineError(f"{path} does not exist; export it first: python -m export.to_onnx")
    try:
        model = onnx.load(path)
    except (DecodeError, onnx.checker.ValidationError, OSError) as error:
        raise EngineError(f"{path} is damaged or no ONNX file ({_first_line(error)}); export it again") from error
    if not model.graph.node:
        raise EngineError(f"{path} holds no graph; export it again")
    return model


def check(model: onnx.ModelProto, plugins: frozenset[tuple[str, str, str]] = frozenset()) -> None:
    """Raise EngineError for what TensorRT would answer with something unclear, or not at all.

    `plugins` are the registered ones as (name, version, namespace).
    """
    _check_interface(model)
    _check_operators(model, plugins)
    _check_weights(model)
    _check_names(model)


def products(model: onnx.ModelProto) -> list[Product]:
    """Every convolution and matrix product. Quantized: the weight, or one of the two activations, comes through a DequantizeLinear.

    Nodes inside local functions are not looked at: the bodies of the custom operators gather and add, and have no such layer.

    Raises:
        EngineError: The shape of a tensor is not fixed, so that its operations cannot be counted.
    """
    graph = _Graph(model)
    return [graph.product(node) for node in model.graph.node if node.op_type in _COMPUTE]


def node_name(node: onnx.NodeProto) -> str:
    """Name of a node as TensorRT gives it back; unnamed ones are called after their first output."""
    return node.name or f"node_of_{node.output[0]}"


class _Graph:
    """Producers, constants and shapes of a graph, and the inputs that each tensor depends on."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.producer = {output: node for node in model.graph.node for output in node.output}
        self.initializer = {tensor.name: tensor for tensor in model.graph.initializer}
        self.sources = {tensor.name: frozenset((tensor.name,)) for tensor in model.graph.input if tensor.name not in self.initializer}
        for node in model.graph.node:
            depends = frozenset().union(*(self.sources.get(name, frozenset()) for name in node.input))
            self.sources.update(dict.fromkeys(node.output, depends))
        self.shapes = _shapes(model)

    def product(self, node: onnx.NodeProto) -> Product:
        dequantized = [self.dequantize(name) for name in node.input[:2]]
        depends = self.sources.get(node.input[0], frozenset()) | self.sources.get(node.input[1], frozenset())
        has_weight = not self.sources.get(node.input[1])
        problem, role = "", "policy"
        if dequantized[1] is not None if has_weight else any(dequantized):
            problem, role = self.problem(dequantized, has_weight), "quantized"
        elif depends <= _GEOMETRY_INPUTS:
            role = "geometry" if depends else "constant"
        return Product(name=node_name(node), op=node.op_type, problem=problem, role=role, flops=self.flops(node))

    def flops(self, node: onnx.NodeProto) -> int:
        """Two for each multiply-accumulate; a bias is not counted."""
        second = self.shape(node.input[1])
        if node.op_type == "Einsum":
            return 2 * _spanned(node, [self.shape(name) for name in node.input])
        if node.op_type in ("Conv", "DeformConv"):
            depth = math.prod(second[1:])
        elif node.op_type == "Gemm" and any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
            depth = second[-1]
        else:
            depth = second[-2]
        return 2 * depth * math.prod(self.shape(node.output[0]))

    def shape(self, name: str) -> Sequence[int]:
        if name not in self.shapes:
            raise EngineError(f"the shape of {name} is not fixed in the ONNX; export it with this project")
        return self.shapes[name]

    def problem(self, sources: list[onnx.NodeProto | None], has_weight: bool) -> str:
        for position, source in enumerate(sources):
            if source is None:
                return f"its input {position} does not come through Q/DQ"
        activations = sources[:1] if has_weight else sources
        if any(self.num_scales(source) > 1 for source in activations):
            return "its activation has a scale per channel; INT8 kernels need one scale per tensor"
        return ""

    def dequantize(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that `name` comes through, across nodes that only move numbers."""
        node = self.producer.get(name)
        while node is not None and node.op_type in _TRANSPARENT:
            node = self.producer.get(node.input[0])
        if node is None:
            return None
        if node.op_type == "Concat":
            sources = [self.dequantize(part) for part in node.input]
            return sources[0] if all(sources) else None
        return node if node.op_type == "DequantizeLinear" else None

    def num_scales(self, dequantize: onnx.NodeProto) -> int:
        scale = self.initializer.get(dequantize.input[1])
        return int(np.prod(scale.dims)) if scale is not None else 1


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor whose sizes are all fixed."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for tensor in (*inferred.input, *inferred.output, *inferred.value_info):
        kind = tensor.type.tensor_type
        if kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim):
            found[tensor.name] = tuple(size.dim_value for size in kind.shape.dim)
    return found


def _spanned(node: onnx.NodeProto, shapes: Sequence[Sequence[int]]) -> int:
    """Multiply-accumulates of an Einsum: the product of the sizes of all its letters."""
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes = {letter: size for term, shape in zip(terms, shapes, strict=True) for letter, size in zip(term, shape, strict=True)}
    return math.prod(sizes.values())


def _check_interface(model: onnx.ModelProto) -> None:
    constants = {tensor.name for tensor in model.graph.initializer}
    for what, found, wanted in (
        ("inputs", [tensor.name for tensor in model.graph.input if tensor.name not in constants], schema.INPUTS),
        ("outputs", [tensor.name for tensor in model.graph.output], schema.OUTPUTS),
    ):
        if set(found) != set(wanted):
            missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
            raise EngineError(
                f"the ONNX has the {what} {', '.join(found) or 'nothing'}; the deployed graph has {', '.join(wanted)}"
                f" (missing: {', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}); export it with this project"
            )


def _check_operators(model: onnx.ModelProto, plugins: frozenset[tuple[str, str, str]]) -> None:
    bodies = {(function.domain, function.name) for function in model.functions}
    names = {name for name, _, _ in plugins}
    for node in _all_nodes(model):
        known = node.domain in _STANDARD_DOMAINS or (node.domain, node.op_type) in bodies or node.op_type in names
        if not known:
            raise EngineError(
                f"node {node_name(node)} is a {node.domain}::{node.op_type}, which has neither a local function of that name in the ONNX "
                "nor a registered plugin; export again with function bodies (plugins/README.md)"
            )


def _check_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            raise EngineError(f"weight {tensor.name} is packed to 4 bits: this is the storage file; build from the ONNX with int8 weights")
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            continue
        values = numpy_helper.to_array(tensor)
        wrong = int(values.size - np.isfinite(values).sum())
        if wrong:
            raise EngineError(f"weight {tensor.name} has {wrong} NaN or infinite of {values.size} values; the checkpoint diverged")


def _check_names(model: onnx.ModelProto) -> None:
    counts = Counter(node_name(node) for node in model.graph.node if node.op_type in _COMPUTE)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise EngineError(f"several layers of the ONNX are called {twice[0]}; the audit needs one name each: export it with this project")


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
