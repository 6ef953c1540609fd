"""The contract of each custom operator: its name, inputs, attributes and output shape.

PyTorch (`torch.ops.qdbev.<torch_name>`), the ONNX node and its function body, the CUDA kernels and the TensorRT plugins read it from here.
The meaning of the inputs is described in qdbev/ops/msda.py, sca.py and deform_conv.py.

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


@dataclass(frozen=True, kw_only=True)
class Operator:
    """Contract of one operator."""

    name: str
    """Type of the ONNX node and name of the TensorRT plugin."""
    torch_name: str
    """Name of the PyTorch operator in the namespace `DOMAIN`."""
    inputs: tuple[str, ...]
    """Names of the inputs, in order."""
    attributes: Mapping[str, Literal["int", "ints"]] = field(hash=False)
    """The node's own attributes and their types."""
    output_shape: Callable[[Mapping[str, Sequence[int]]], tuple[int, ...]] = field(repr=False)
    """Function that gives the shape of the only output from the shapes of the inputs, which it takes by name."""

    @property
    def has_integer_value(self) -> bool:
        """True for an operator that reads an int8 value and its scale."""
        return "value_scale" in self.inputs

    @property
    def value_inputs(self) -> tuple[str, ...]:
        """Names of the leading inputs, which are features and may be float16 or int8. All others are coordinates and logits in float32."""
        return self.inputs[:2] if self.has_integer_value else self.inputs[:1]


def _attended(shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Output shape of both attentions, (B, Q, M * C)."""
    batch, num_query = shapes["attention_logits"][:2]
    heads, channels = shapes["value"][-2:]
    return batch, num_query, heads * channels


def _columns(shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Output shape of the gather, (B, C * 9, h, w)."""
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
"""Deformable attention to one set of feature levels; the attribute `level_hw` is the list h0, w0, h1, w1, ..."""
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
"""Gather of the columns of a modulated deformable convolution; the matrix product follows as an ordinary node."""


def with_integer_value(operator: Operator) -> Operator:
    """The variant of an attention whose `value` is int8, followed by an input `value_scale` (), the size of one int8 step."""
    first, *others = operator.inputs
    return replace(operator, name=f"{operator.name}Int8", inputs=(first, "value_scale", *others))


MSDA_INT8 = with_integer_value(MSDA)
SCA_INT8 = with_integer_value(SCA)

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (MSDA, SCA, IM2COL, MSDA_INT8, SCA_INT8)}
"""All operators by ONNX name."""
INTEGER_FORMS: dict[str, Operator] = {MSDA.name: MSDA_INT8, SCA.name: SCA_INT8}
"""Variants with an int8 value, by the ONNX name of the float operator."""

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""Node attributes by which TensorRT finds the registered plugin, which it prefers to the function body of the node."""
