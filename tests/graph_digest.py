"""A canonical description of an ONNX graph, for tests that hold the structure of deployed graphs.

The description does not depend on tensor names or on the order of the nodes in the file: nodes are numbered in the order in which a
depth-first walk from the outputs finishes them. It holds operators, domains, attributes, wiring, types and shapes of constants, the
values of integer constants (axes and shapes), the function bodies, and the names of the nodes that audits trace. Floats and int8 weights
enter only on request, because their last bits can differ between CPUs.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

_NAMED = ("Conv", "Gemm", "MatMul", "Einsum", "DeformConv")
"""Operator types of ONNX itself whose node names are part of the description, as are the names of all custom nodes."""
_MACHINE_INDEPENDENT = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
_SHOWN_VALUES = 12
"""Integer constants with at most this many values are written out; longer ones are hashed."""


def describe(model: onnx.ModelProto, weights: bool = False) -> list[str]:
    """Lines that describe a model. `weights` adds a hash of every float and int8 constant."""
    constants = {tensor.name: _constant(tensor, weights) for tensor in model.graph.initializer}
    inputs = {tensor.name: f"{tensor.name} {_type(tensor)}" for tensor in model.graph.input}
    opsets = [f"opset {entry.domain or 'onnx'} {entry.version}" for entry in sorted(model.opset_import, key=lambda entry: entry.domain)]
    lines = [
        f"ir {model.ir_version}",
        *opsets,
        *_lines(model.graph.node, inputs, constants, [out.name for out in model.graph.output], weights),
    ]
    lines += [f"output {tensor.name} {_type(tensor)}" for tensor in model.graph.output]
    for function in sorted(model.functions, key=lambda function: (function.domain, function.name)):
        opsets = [f"{entry.domain or 'onnx'} {entry.version}" for entry in function.opset_import]
        lines.append(f"function {function.domain}::{function.name} {list(function.attribute)} {opsets}")
        lines += _lines(function.node, {name: name for name in function.input}, {}, list(function.output), weights)
    return lines


def digest(model: onnx.ModelProto) -> dict[str, object]:
    """The description of a model in short: how many nodes of each type, and a hash of everything that is the same on every machine."""
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return {"op_types": dict(sorted(counts.items())), "sha256": hashlib.sha256("\n".join(describe(model)).encode()).hexdigest()}


def _lines(
    nodes: Iterable[NodeProto], inputs: dict[str, str], constants: dict[str, str], outputs: Sequence[str], weights: bool
) -> list[str]:
    """One line for each input, constant and node that an output depends on, in canonical order, and one for each output."""
    producers = {name: node for node in nodes for name in node.output}
    numbers: dict[str, str] = {"": "none"}
    lines: list[str] = []

    def number(name: str, text: str) -> None:
        numbers[name] = f"%{len(lines)}"
        lines.append(f"{numbers[name]} = {text}")

    left = list(reversed(outputs))
    while left:
        name = left[-1]
        missing = [] if name in numbers else _missing(producers.get(name), numbers)
        if missing:
            left.extend(reversed(missing))
            continue
        left.pop()
        if name in numbers:
            continue
        node = producers.get(name)
        if node is None and name in constants:
            # Written where it is read: the exporter merges equal scalars, and two steps may be equal on one CPU only.
            numbers[name] = f"<{constants[name]}>"
            continue
        if node is None:
            number(name, inputs.get(name) or f"unknown {name}")
            continue
        _number_outputs(node, number, f"{_node(node, weights)}({', '.join(numbers[entry] for entry in node.input)})")
    return [*lines, *(f"returns {numbers[name]}" for name in outputs)]


def _missing(node: NodeProto | None, numbers: dict[str, str]) -> list[str]:
    return [name for name in node.input if name not in numbers] if node is not None else []


def _number_outputs(node: NodeProto, number: Callable[[str, str], None], text: str) -> None:
    for index, name in enumerate(node.output):
        if name:
            number(name, text if len(node.output) == 1 else f"{text}[{index}]")


def _node(node: NodeProto, weights: bool) -> str:
    attributes = ", ".join(sorted(_attribute(attribute, weights) for attribute in node.attribute))
    name = f" '{node.name}'" if node.domain or node.op_type in _NAMED else ""
    return f"{node.domain}::{node.op_type}{name} {{{attributes}}}"


def _attribute(attribute: AttributeProto, weights: bool) -> str:
    if attribute.ref_attr_name:
        return f"{attribute.name}=@{attribute.ref_attr_name}"
    value = helper.get_attribute_value(attribute)
    return f"{attribute.name}={_constant(value, weights) if isinstance(value, TensorProto) else value!r}"


def _constant(tensor: TensorProto, weights: bool) -> str:
    kind = f"{TensorProto.DataType.Name(tensor.data_type)}{list(tensor.dims)}"
    if not weights and tensor.data_type not in _MACHINE_INDEPENDENT:
        return f"constant {kind}"
    values = numpy_helper.to_array(tensor)
    if tensor.data_type in _MACHINE_INDEPENDENT and values.size <= _SHOWN_VALUES:
        return f"constant {kind} {values.tolist()}"
    return f"constant {kind} {hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]}"


def _type(tensor: onnx.ValueInfoProto) -> str:
    kind = tensor.type.tensor_type
    return f"{TensorProto.DataType.Name(kind.elem_type)}{[size.dim_value for size in kind.shape.dim]}"
