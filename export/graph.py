"""Steps that several passes share: read and add constants, create nodes, and follow values upstream.

A pass takes the deployed graph as an `onnx_ir.Model`, changes it in place and returns how many places it changed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

PRODUCTS = ("Conv", "Gemm", "MatMul")
"""Operators that multiply by a weight or multiply two activations."""
_REORDER = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Split", "Gather", "Expand", "Concat")
"""Operators that pass on the elements of their first input unchanged."""


class PassError(ValueError):
    """A pass left something in the graph that it exists to remove. The export fails, because the engine would be slow or inexact."""


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Array of a constant, None for a value that nodes compute."""
    return value.const_value.numpy() if value is not None and value.is_initializer() else None


def add_constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    """Add a constant to `graph`. Its name gets a number if another constant has it."""
    unused, count = name, 1
    while unused in graph.initializers:
        unused, count = f"{name}_{count}", count + 1
    return ir.tape.Tape(graph).initializer(ir.tensor(np.array(values, order="C")), unused)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and constants that no output depends on."""
    common.RemoveUnusedNodesPass()(model)


def infer_shapes(model: ir.Model) -> None:
    """Set type and shape of every value for which they follow from the inputs."""
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def declare_opset(model: ir.Model, version: int) -> None:
    """Declare another version of ONNX's own operator set in the model and its functions. The nodes are not changed."""
    for owner in (model.graph, *model.functions.values()):
        owner.opset_imports[""] = version


def sources(graph: ir.Graph) -> dict[ir.Value, frozenset[str]]:
    """Names of the graph inputs that each value depends on. Constants and what is computed from them alone depend on none."""
    found: dict[ir.Value, frozenset[str]] = {value: frozenset((value.name,)) for value in graph.inputs}
    for node in graph:
        depends = frozenset().union(*(found.get(value, frozenset()) for value in node.inputs if value is not None))
        found.update(dict.fromkeys(node.outputs, depends))
    return found


def before_reordering(value: ir.Value) -> ir.Value:
    """The value upstream that has the same elements, before all nodes that only reorder, choose or repeat them."""
    while (node := value.producer()) is not None and node.op_type in _REORDER and node.domain == "":
        value = node.inputs[0]
    return value


def replace_node(old: ir.Node, new: Sequence[ir.Node], result: ir.Value) -> None:
    """Put the nodes `new` in the place of `old`, whose only output becomes `result` under its old name."""
    ir.convenience.replace_nodes_and_values(old.graph, old, [old], new, old.outputs, [result])


class NodeBuilder:
    """Creates nodes in order. Calling it creates a node and returns its only output; a list of integers becomes a 1-D int64 constant."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *inputs: ir.Value | list[int] | None, **attributes: Any) -> ir.Value:
        values = [self.integers(given) if isinstance(given, list) else given for given in inputs]
        return self.add(ir.node(op_type, values, attributes))

    def add(self, node: ir.Node) -> ir.Value:
        """Add a node as the next one and return its first output."""
        self.nodes.append(node)
        return node.outputs[0]

    def integers(self, values: list[int]) -> ir.Value:
        """1-D int64 constant."""
        raise NotImplementedError


class GraphNodes(NodeBuilder):
    """Nodes that replace the node `replaced` of the main graph. Their names begin with its name, and constants become initializers."""

    def __init__(self, replaced: ir.Node) -> None:
        super().__init__()
        self._graph, self._name = replaced.graph, replaced.name

    def add(self, node: ir.Node) -> ir.Value:
        """Add a node, named after the replaced node, its operator type and its position."""
        node.name = f"{self._name}/{node.op_type}_{len(self.nodes)}"
        return super().add(node)

    def integers(self, values: list[int]) -> ir.Value:
        """1-D int64 constant."""
        return add_constant(self._graph, f"{self._name}.constant", np.array(values, np.int64))
