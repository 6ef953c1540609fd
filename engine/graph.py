"""The ONNX file as the engine room needs it: checked at the door, and which of its layers are quantized.

Every check answers a mistake with one sentence that names the node or tensor, before TensorRT sees the file.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from engine.backend import EngineError
from qdbev import schema

_COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_TRANSPARENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Cast", "Identity", "Expand", "MaxPool")
"""Nodes that move numbers without changing them: TensorRT lets a DequantizeLinear pass behind them."""
_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class QuantizedLayer:
    """A node meant to run in INT8. `problem` says what in the ONNX keeps it from it, empty where nothing does."""

    name: str
    op: str
    problem: str


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


def quantized_layers(model: onnx.ModelProto) -> list[QuantizedLayer]:
    """Convolutions and matrix products whose weight, or one of whose two activations, comes through a DequantizeLinear.

    Nodes inside local functions are not looked at: the bodies of the custom operators gather and add, and have no such layer.
    """
    graph = _Graph(model)
    return [layer for node in model.graph.node if node.op_type in _COMPUTE and (layer := graph.layer(node)) is not None]


def node_name(node: onnx.NodeProto) -> str:
    """Name of a node as TensorRT gives it back; unnamed ones are called after their first output."""
    return node.name or f"node_of_{node.output[0]}"


class _Graph:
    """Producers and constants of a graph, to follow a tensor backwards."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.producer = {output: node for node in model.graph.node for output in node.output}
        self.initializer = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constant = {"", *self.initializer}
        for node in model.graph.node:
            if self.constant.issuperset(node.input):
                self.constant.update(node.output)

    def layer(self, node: onnx.NodeProto) -> QuantizedLayer | None:
        sources = [self.dequantize(name) for name in node.input[:2]]
        has_weight = node.input[1] in self.constant
        wanted = sources[1] is not None if has_weight else any(sources)
        if not wanted:
            return None
        return QuantizedLayer(name=node_name(node), op=node.op_type, problem=self.problem(sources, has_weight))

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
