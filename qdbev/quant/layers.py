"""Quantized layers in place of a convolution, a linear layer, an embedding, or any op that declares `quantized_inputs`.

A quantized layer keeps the name, the parameters and the state-dict keys of the float layer; only the quantizers are added.
"""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from qdbev.quant.config import Bits, RangeMode
from qdbev.quant.quantizer import Quantizer


@dataclass(frozen=True)
class LayerSpec:
    """Quantization settings of one layer."""

    bits: Bits
    range_mode: RangeMode = "step"
    per_channel: bool = True
    """True gives each channel of the weight a step of its own; False gives the whole weight one step."""

    def activation(self) -> Quantizer:
        """A new quantizer for an input of the layer."""
        return Quantizer(self.bits.activation, range_mode=self.range_mode)

    def weight(self, weight: Tensor) -> Quantizer:
        """A new quantizer for the weight (C, ...), on the same device."""
        num_steps = weight.shape[0] if self.per_channel else 1
        return Quantizer(self.bits.weight, weight_steps=num_steps, range_mode=self.range_mode).to(weight.device)


class QuantConv2d(nn.Conv2d):
    """Convolution of a quantized input (one step) and a quantized weight (a step per output channel, or one); the bias stays float."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, conv: nn.Conv2d, spec: LayerSpec) -> Self:
        """Quantized layer that uses the parameters of `conv`."""
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        layer = cls(*shape, conv.bias is not None, conv.padding_mode, device="meta")
        _take_over(layer, conv, spec)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """Linear layer of a quantized input (one step) and a quantized weight (a step per output, or one); the bias stays float."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: LayerSpec) -> Self:
        """Quantized layer that uses the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        _take_over(layer, linear, spec)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantEmbedding(nn.Module):
    """Embedding table (V, C) with a step for each row. Its attribute `weight` is the quantized table, for networks that read it whole."""

    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, embedding: nn.Embedding, spec: LayerSpec) -> Self:
        """Quantized table that uses the parameter of `embedding`.

        Raises:
            ValueError: The embedding has a padding index or a largest norm, which have no effect where the whole table is read.
        """
        if embedding.padding_idx is not None or embedding.max_norm is not None:
            raise ValueError(f"{embedding} has padding_idx or max_norm, which cannot be quantized; add its name to quant.float_layers")
        layer = cls()
        layer._parameters["weight"] = embedding.weight  # register_parameter refuses the name of a property
        layer.weight_quantizer = spec.weight(embedding.weight)
        return layer.train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """(V, C) quantized table."""
        return self.weight_quantizer(weight_of(self))

    @property
    def num_embeddings(self) -> int:
        """Number of rows V."""
        return weight_of(self).shape[0]

    def forward(self, indices: Tensor) -> Tensor:
        """Rows (..., C) of the quantized table at `indices` (...)."""
        return F.embedding(indices, self.weight)


class QuantOp(nn.Module):
    """An op whose positional arguments at `op.quantized_inputs` are quantized, with one step each. The op should have no parameters."""

    def __init__(self, op: nn.Module, input_quantizers: list[Quantizer]) -> None:
        super().__init__()
        self.op = op
        self.input_quantizers = nn.ModuleList(input_quantizers)

    @classmethod
    def from_float(cls, op: nn.Module, spec: LayerSpec) -> Self:
        """Wrapper around `op` itself, not a copy."""
        device = next((p.device for p in op.parameters()), None)
        layer = cls(op, [spec.activation().to(device) for _ in op.quantized_inputs])
        return layer.train(op.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the op does; the quantized arguments must be positional."""
        inputs = list(args)
        for index, quantizer in zip(self.op.quantized_inputs, self.input_quantizers, strict=True):
            inputs[index] = quantizer(inputs[index])
        return self.op(*inputs, **kwargs)


WeightLayer = QuantConv2d | QuantLinear | QuantEmbedding
QuantLayer = WeightLayer | QuantOp


def quant_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """Name and module of every quantized layer, in the order of `named_modules`."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]


def activation_quantizers(layer: QuantLayer) -> list[Quantizer]:
    """Quantizers of the inputs of a layer; an embedding has none."""
    if isinstance(layer, QuantOp):
        return list(layer.input_quantizers)
    return [] if isinstance(layer, QuantEmbedding) else [layer.input_quantizer]


def quantizers(layer: QuantLayer) -> list[Quantizer]:
    """Input quantizers of a layer, then its weight quantizer where it has a weight."""
    weight = [layer.weight_quantizer] if isinstance(layer, WeightLayer) else []
    return activation_quantizers(layer) + weight


def weight_of(layer: WeightLayer) -> nn.Parameter:
    """The weight that training changes, before it is quantized."""
    return layer._parameters["weight"]


def step_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every learned step, whether its quantizer is on or off. They need an optimizer group of their own, without weight decay."""
    return [module.log_step for module in model.modules() if isinstance(module, Quantizer) and module.learn]


def _take_over(layer: QuantConv2d | QuantLinear, source: nn.Conv2d | nn.Linear, spec: LayerSpec) -> None:
    """Give `layer` the parameters of `source` and new quantizers."""
    layer.weight, layer.bias = source.weight, source.bias
    layer.input_quantizer = spec.activation().to(source.weight.device)
    layer.weight_quantizer = spec.weight(source.weight)
    layer.train(source.training)
