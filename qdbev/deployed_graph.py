"""Reads deployed ONNX graphs: opens the file, checks that it is one, and derives shapes and dependencies of its tensors.

A wrong file is refused here with the name of the node or tensor, before a runtime gives an unclear error, or none.
"""

import itertools
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qdbev.schema import Interface

STANDARD_DOMAINS = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""
Plugins = frozenset[tuple[str, str, str]]
"""Registered TensorRT plugins as (name, version, namespace)."""
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
_INT4 = (TensorProto.INT4, TensorProto.UINT4)
_MAX_ERROR_LENGTH = 200
"""Characters of another library's error message that are shown."""


class DeployedGraphError(ValueError):
    """A file that is no deployed ONNX graph, or one that cannot be run or built."""


def load(path: Path) -> onnx.ModelProto:
    """Read an ONNX file. Raises DeployedGraphError if it is missing, empty, damaged or no ONNX."""
    if not path.is_file():
        raise DeployedGraphError(f"{path} does not exist; export it first: python -m export.to_onnx")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf raises several types, which differ between its implementations
        raise DeployedGraphError(f"{path} is damaged or no ONNX file ({first_line(error)}); export it again") from error
    if not model.graph.node:
        raise DeployedGraphError(f"{path} holds no graph; export it again")
    return model


def check(path: Path, model: onnx.ModelProto, interface: Interface, plugins: Plugins = frozenset()) -> None:
    """Check that `model`, read from `path`, is the deployed graph of a detector and can be run with these plugins.

    Raises:
        DeployedGraphError: Types and shapes of the graph contradict each other, names or shapes of inputs or outputs differ, an operator
            has neither a body nor a plugin, or a weight is damaged, NaN or infinite.
    """
    try:
        onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise DeployedGraphError(f"{path}: the graph contradicts itself ({first_line(error)}); export it again") from error
    _check_interface(path, model, interface)
    _check_operators(path, model, plugins)
    _check_finite(path, model)


def require_int8_storage(path: Path, model: onnx.ModelProto) -> None:
    """Raise DeployedGraphError if weights are stored in 4 bits, which engines cannot be built from."""
    for tensor in model.graph.initializer:
        if tensor.data_type in _INT4:
            raise DeployedGraphError(
                f"{path}: weight {tensor.name} is packed to 4 bits: this is the storage file; build from the ONNX with int8 weights"
            )


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the main graph whose sizes are all fixed."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for info in (*inferred.input, *inferred.output, *inferred.value_info):
        kind = info.type.tensor_type
        if kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim):
            found[info.name] = tuple(size.dim_value for size in kind.shape.dim)
    return found


def input_names(model: onnx.ModelProto) -> list[str]:
    """Names of the inputs, without constants that are listed as inputs too."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [tensor.name for tensor in model.graph.input if tensor.name not in constants]


def dependencies(model: onnx.ModelProto) -> dict[str, frozenset[str]]:
    """Names of the graph inputs that each tensor depends on. Constants have no entry; what is computed from them alone depends on none."""
    found = {name: frozenset((name,)) for name in input_names(model)}
    for node in model.graph.node:
        depends = frozenset().union(*(found.get(name, frozenset()) for name in node.input))
        found.update(dict.fromkeys(node.output, depends))
    return found


def node_name(node: onnx.NodeProto) -> str:
    """Name of a node as TensorRT reports it; a node without a name is called after its first output."""
    return node.name or f"node_of_{node.output[0]}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, for one-line messages of our own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_MAX_ERROR_LENGTH]


def _check_interface(path: Path, model: onnx.ModelProto, interface: Interface) -> None:
    known = shapes(model)
    for kind, found, wanted in (
        ("inputs", input_names(model), interface.inputs),
        ("outputs", [tensor.name for tensor in model.graph.output], interface.outputs),
    ):
        if set(found) != set(wanted):
            raise DeployedGraphError(
                f"{path} has the {kind} {_listed(found)}; the deployed graph has {_listed(wanted)} (missing: "
                f"{_listed(sorted(set(wanted) - set(found)))}; unknown: {_listed(sorted(set(found) - set(wanted)))}); "
                "export it with this project"
            )
        for name, shape in wanted.items():
            if known.get(name, ()) != shape:
                raise DeployedGraphError(f"{path}: {name} has the shape {known.get(name)}, expected {shape}; export it again")


def _check_operators(path: Path, model: onnx.ModelProto, plugins: Plugins) -> None:
    bodies = {(function.domain, function.name) for function in model.functions}
    names = {name for name, _, _ in plugins}
    for node in itertools.chain(model.graph.node, *(function.node for function in model.functions)):
        if node.domain not in STANDARD_DOMAINS and (node.domain, node.op_type) not in bodies and node.op_type not in names:
            raise DeployedGraphError(
                f"{path}: node {node_name(node)} is a {node.domain}::{node.op_type} without a function body in the ONNX or a registered "
                "plugin of that name; export it again, with function bodies (plugins/README.md)"
            )


def _check_finite(path: Path, model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATS:
            try:
                values = numpy_helper.to_array(tensor)
            except ValueError as error:
                raise DeployedGraphError(f"{path}: weight {tensor.name} is damaged ({first_line(error)}); export it again") from error
            wrong = int(values.size - np.isfinite(values).sum())
            if wrong:
                raise DeployedGraphError(
                    f"{path}: {wrong} of {values.size} values of weight {tensor.name} are NaN or infinite; the training diverged"
                )


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "none"
