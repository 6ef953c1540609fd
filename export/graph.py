"""An ONNX graph open for edits: who makes a tensor, who reads it, which tensors are constants."""

from collections import defaultdict
from collections.abc import Collection, MutableSequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper


class Graph:
    """The main graph of a model; constants are its initializers."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self.initializers = {tensor.name: tensor for tensor in self.proto.initializer}
        self.producers = {output: node for node in self.proto.node for output in node.output}
        self.outputs = {output.name for output in self.proto.output}

    def constant(self, name: str) -> np.ndarray | None:
        """Value of a constant tensor, None if it is computed."""
        return numpy_helper.to_array(self.initializers[name]) if name in self.initializers else None

    def add_constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant and return its name, which gets a suffix if it is taken."""
        unique = unused(name, self.initializers.keys() | self.producers.keys())
        self.proto.initializer.append(numpy_helper.from_array(np.array(values, order="C"), unique))
        self.initializers[unique] = self.proto.initializer[-1]
        return unique

    def readers(self) -> dict[str, list[NodeProto]]:
        """Nodes that read each tensor."""
        found: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                found[name].append(node)
        return found

    def redirect(self, old: str, new: str) -> None:
        """Let `new` stand for `old`: its readers read `new`, or `new` takes its name where `old` is a graph output."""
        if old in self.outputs:
            self.producers[old].output[0] = f"{old}_redirected"
            self.rename({new: old})
            self.forget([old])
            return
        for reader in self.readers()[old]:
            for index, name in enumerate(reader.input):
                reader.input[index] = new if name == old else name

    def forget(self, names: Collection[str]) -> None:
        """Drop what is noted of the shapes of tensors, which hold something else now."""
        _drop(self.proto.value_info, [info.name not in names for info in self.proto.value_info])

    def rename(self, new_names: dict[str, str]) -> None:
        """Rename tensors wherever they are made or read; graph outputs must not be among them."""
        for node in self.proto.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = new_names.get(name, name)
        named: list[TensorProto | onnx.ValueInfoProto] = [*self.proto.initializer, *self.proto.value_info]
        for item in named:
            item.name = new_names.get(item.name, item.name)
        self.initializers = {new_names.get(name, name): tensor for name, tensor in self.initializers.items()}
        self.producers = {new_names.get(name, name): node for name, node in self.producers.items()}

    def prune(self) -> None:
        """Drop nodes and constants that no output depends on."""
        wanted = set(self.outputs)
        for node in reversed(self.proto.node):
            if wanted.intersection(node.output):
                wanted.update(node.input)
        _drop(self.proto.node, [bool(wanted.intersection(node.output)) for node in self.proto.node])
        _drop(self.proto.initializer, [tensor.name in wanted for tensor in self.proto.initializer])
        _drop(self.proto.value_info, [info.name in wanted for info in self.proto.value_info])
        self.initializers = {tensor.name: tensor for tensor in self.proto.initializer}
        self.producers = {output: node for node in self.proto.node for output in node.output}


def opset(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operator set that the model declares."""
    return next(entry.version for entry in model.opset_import if entry.domain == "")


def declare_opset(model: onnx.ModelProto, version: int) -> None:
    """Declare another version of ONNX's own operator set in the model and its functions; nodes stay as they are."""
    for owner in (model, *model.functions):
        for entry in owner.opset_import:
            if entry.domain == "":
                entry.version = version


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor; the deployed graph's are all fixed."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    infos = (*inferred.input, *inferred.output, *inferred.value_info)
    found = {info.name: tuple(size.dim_value for size in info.type.tensor_type.shape.dim) for info in infos}
    return found | {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}


def unused(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it if it is taken."""
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate


def integers(node: NodeProto, attribute: str, default: list[int] | int) -> list[int] | int:
    """An integer attribute of a node, or a list of integers."""
    for found in node.attribute:
        if found.name == attribute:
            return onnx.helper.get_attribute_value(found)
    return default


def _drop(items: MutableSequence, keep: list[bool]) -> None:
    for index in reversed(range(len(items))):
        if not keep[index]:
            del items[index]
