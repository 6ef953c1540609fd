"""The contract of each custom operator: its name, inputs, attributes and output shape, stated once.

PyTorch (`torch.ops.qdbev.<torch_name>`), the ONNX node and its function body, the CUDA kernels and the TensorRT plugins all read it
from here. What the numbers mean is in the docstrings of qdbev/ops/{msda,sca,deform_conv}.py.

B batch, N cameras, S keys of all levels, M heads, C channels of a head, Q queries, D pillar points, L levels, P points of a level.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

DOMAIN = "qdbev"
"""PyTorch namespace, ONNX domain and TensorRT plugin namespace of all custom operators."""
VERSION = 1
"""Version of the ONNX domain and of the TensorRT plugins."""
OPSET = 18
"""ONNX operator set of the deployed graph and of the function bodies."""

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator. `name` is the ONNX node type and the TensorRT plugin; `torch_name` names the PyTorch operator."""

    name: str
    torch_name: str
    inputs: tuple[str, ...]
    """Names of the inputs, in order."""
    attributes: Mapping[str, Literal["int", "ints"]] = field(hash=False)
    """The node's own attributes and their types."""
    output_shape: Callable[[Mapping[str, Sequence[int]]], Shape] = field(repr=False)
    """Shape of the only output from the shapes of the inputs by name."""

    @property
    def has_integer_value(self) -> bool:
        """True for the form that reads an int8 value and its scale."""
        return "value_scale" in self.inputs

    @property
    def value_inputs(self) -> tuple[str, ...]:
        """The first inputs, which carry features and may be float16 or int8. All others are coordinates and logits in float32."""
        return self.inputs[:2] if self.has_integer_value else self.inputs[:1]


def _attended(shapes: Mapping[str, Sequence[int]]) -> Shape:
    """(B, Q, M * C)."""
    batch, num_query = shapes["attention_logits"][:2]
    heads, channels = shapes["value"][-2:]
    return batch, num_query, heads * channels


def _columns(shapes: Mapping[str, Sequence[int]]) -> Shape:
    """(B, C * 9, h, w)."""
    batch, channels = shapes["x"][:2]
    taps, height, width = shapes["mask"][1:]
    return batch, channels * taps, height, width


MSDA = Operator(
    name="MultiScaleDeformableAttention",
    torch_name="multi_scale_deformable_attention",
    inputs=("value", "reference_points", "sampling_offsets", "attention_logits"),
    attributes={"level_hw": "ints"},
    output_shape=_attended,
)
"""Deformable attention; `level_hw` is h0, w0, h1, w1, ..."""
SCA = Operator(
    name="SpatialCrossAttention",
    torch_name="spatial_cross_attention",
    inputs=("value", "reference_points", "visible", "sampling_offsets", "attention_logits"),
    attributes={"level_hw": "ints"},
    output_shape=_attended,
)
"""Deformable attention of BEV queries to all cameras that see them; `level_hw` as in MSDA."""
IM2COL = Operator(
    name="ModulatedDeformableIm2col",
    torch_name="modulated_deformable_im2col",
    inputs=("x", "offsets", "mask"),
    attributes={"stride": "int"},
    output_shape=_columns,
)
"""The gather of a modulated deformable convolution."""


def with_integer_value(operator: Operator) -> Operator:
    """The form of an attention whose `value` is int8, followed by the input `value_scale` (): one int8 step in units of the value."""
    first, *others = operator.inputs
    return replace(operator, name=f"{operator.name}Int8", inputs=(first, "value_scale", *others))


MSDA_INT8 = with_integer_value(MSDA)
SCA_INT8 = with_integer_value(SCA)

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (MSDA, SCA, IM2COL, MSDA_INT8, SCA_INT8)}
"""All operators by ONNX name."""
INTEGER_FORMS: dict[str, Operator] = {MSDA.name: MSDA_INT8, SCA.name: SCA_INT8}
"""The integer form of each operator that has one, by the name of its float form."""

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Attributes of every node by which TensorRT finds the registered plugin; it takes that before the node's function body."""
