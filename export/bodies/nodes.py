"""Creates the nodes of an operator's ONNX function body, in which every constant is a Constant node."""

from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir as ir

from export.graph import NodeBuilder

Inputs = Mapping[str, ir.Value]
"""Inputs of a body by their names in the operator's contract."""


class Sizes(NamedTuple):
    """Sizes that are fixed when a body is made; zero for an operator that has no levels."""

    levels: int = 0
    points: int = 0
    """Sampling points of each level."""


class BodyNodes(NodeBuilder):
    """The nodes of one body, in order."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    def add(self, node: ir.Node) -> ir.Value:
        """Add a node without a name, because runtimes call a node of a body after its output."""
        node.name, node.outputs[0].name = "", f"{node.op_type}_{len(self.nodes)}"
        return super().add(node)

    def integers(self, values: list[int]) -> ir.Value:
        """1-D int64 constant."""
        return self("Constant", value_ints=values)

    def integer(self, value: int) -> ir.Value:
        """int64 constant without dimensions."""
        return self("Constant", value_int=value)

    def scalar(self, value: float) -> ir.Value:
        """float32 constant without dimensions."""
        return self("Constant", value_float=value)

    def attribute(self, name: str, kind: ir.AttributeType) -> ir.Value:
        """Value of the node's own attribute: int64 without dimensions for an integer, 1-D for a list of integers."""
        field = "value_ints" if kind == ir.AttributeType.INTS else "value_int"
        return self.add(ir.Node("", "Constant", [], attributes=[ir.RefAttr(field, name, kind)]))

    def size(self, value: ir.Value, axis: int, end: int | None = None) -> ir.Value:
        """1-D sizes of the axes from `axis` up to `end`; of `axis` alone without `end`."""
        return self("Shape", value, start=axis, end=axis + 1 if end is None else end)

    def sizes_from(self, value: ir.Value, axis: int) -> ir.Value:
        """1-D sizes of `axis` and all axes after it."""
        return self("Shape", value, start=axis)

    def join(self, *parts: ir.Value | list[int]) -> ir.Value:
        """1-D concatenation."""
        return self("Concat", *parts, axis=0)

    def select(self, value: ir.Value, index: int, axis: int) -> ir.Value:
        """One entry along `axis`, which disappears."""
        return self("Gather", value, self.integer(index), axis=axis)
