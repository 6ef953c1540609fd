"""Lists the convolutions and matrix products of a deployed ONNX graph, and says which of them are quantized."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx

from engine.backend import EngineError
from qdbev import deployed_graph
from qdbev.deployed_graph import node_name

_COMPUTE = ("Conv", "Gemm", "MatMul", "Einsum", "DeformConv")
_TRANSPARENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Cast", "Identity", "Expand", "MaxPool")
"""Operators that keep the values of their input. TensorRT moves a DequantizeLinear past them."""

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


def products(model: onnx.ModelProto, geometry: Collection[str]) -> list[Product]:
    """Every convolution and matrix product. It is quantized if the weight, or one of two activations, comes through a DequantizeLinear.

    Nodes inside local functions are left out: the bodies of the custom operators gather and add, and contain no such layer. Products of the
    graph inputs `geometry` alone, which hold calibration and motion, stay float: they have mixed units, and are few.

    Raises:
        EngineError: The shape of a tensor is not fixed, so that its operations cannot be counted, or two products have the same name.
    """
    graph = _Graph(model, geometry)
    found = [graph.product(node) for node in model.graph.node if node.op_type in _COMPUTE]
    repeated = [name for name, count in Counter(product.name for product in found).items() if count > 1]
    if repeated:
        raise EngineError(
            f"several layers of the ONNX are called {repeated[0]}; the audit needs one name each: export it with this project"
        )
    return found


class _Graph:
    """Producers, constants and shapes of a graph, and the inputs that each tensor depends on."""

    def __init__(self, model: onnx.ModelProto, geometry: Collection[str]) -> None:
        self.producer = {output: node for node in model.graph.node for output in node.output}
        self.initializer = {tensor.name: tensor for tensor in model.graph.initializer}
        self.sources = deployed_graph.dependencies(model)
        self.geometry = frozenset(geometry)
        self.shapes = deployed_graph.shapes(model)

    def product(self, node: onnx.NodeProto) -> Product:
        dequantized = [self.dequantize(name) for name in node.input[:2]]
        depends = self.sources.get(node.input[0], frozenset()) | self.sources.get(node.input[1], frozenset())
        has_weight = not self.sources.get(node.input[1])
        problem, role = "", "policy"
        if dequantized[1] is not None if has_weight else any(dequantized):
            problem, role = self.problem(dequantized, has_weight), "quantized"
        elif depends <= self.geometry:
            role = "geometry" if depends else "constant"
        return Product(name=node_name(node), op=node.op_type, problem=problem, role=role, flops=self.flops(node))

    def flops(self, node: onnx.NodeProto) -> int:
        """Two for each multiply-accumulate; a bias is not counted."""
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        second = self.shape(node.input[1])
        if node.op_type == "Einsum":
            terms = attributes["equation"].decode().replace(" ", "").split("->")[0].split(",")
            shapes = [self.shape(name) for name in node.input]
            sizes = {letter: size for term, shape in zip(terms, shapes, strict=True) for letter, size in zip(term, shape, strict=True)}
            return 2 * math.prod(sizes.values())
        if node.op_type in ("Conv", "DeformConv"):
            depth = math.prod(second[1:])
        elif attributes.get("transB"):
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
        for source in sources[:1] if has_weight else sources:
            scale = self.initializer.get(source.input[1])
            if scale is not None and math.prod(scale.dims) > 1:
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
