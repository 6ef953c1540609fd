"""Quantized layers in place of a convolution, a linear layer, an embedding, or any op that declares `quantized_inputs`.

A quantized layer keeps the name, the parameters and the state-dict keys of the float layer; only the quantizers are added.
"""

from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional as F

from qdbev.quant.config import Bits, QuantConfig
from qdbev.quant.quantizer import Quantizer


class _InputAndWeight(nn.Module):
    """Quantizes the input (one step) and the weight (a step for each output channel, or one) of a layer, whose bias stays float."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    arguments: ClassVar[tuple[str, ...]]
    """Arguments of the float layer's constructor that it keeps as attributes."""

    @classmethod
    def from_float(cls, source: nn.Conv2d | nn.Linear, bits: Bits, policy: QuantConfig) -> Self:
        """Quantized layer that uses the parameters of `source`."""
        layer = cls(**{name: getattr(source, name) for name in cls.arguments}, bias=source.bias is not None, device="meta")
        layer.weight, layer.bias = source.weight, source.bias
        device, num_steps = source.weight.device, len(source.weight) if policy.per_channel else 1
        layer.input_quantizer = Quantizer(bits.activation, range_mode=policy.range_mode).to(device)
        layer.weight_quantizer = Quantizer(bits.weight, weight_steps=num_steps, range_mode=policy.range_mode).to(device)
        return layer.train(source.training)


class QuantConv2d(_InputAndWeight, nn.Conv2d):
    """Convolution of a quantized input and a quantized weight."""

    arguments = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantLinear(_InputAndWeight, nn.Linear):
    """Linear layer of a quantized input and a quantized weight."""

    arguments = ("in_features", "out_features")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantEmbedding(nn.Module):
    """Embedding table (V, C) with a step for each row. Its attribute `weight` is the quantized table, for networks that read it whole."""

    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, embedding: nn.Embedding, bits: Bits, policy: QuantConfig) -> Self:
        """Quantized table that uses the parameter of `embedding`.

        Raises:
            ValueError: The embedding has a padding index or a largest norm, which have no effect where the whole table is read.
        """
        if embedding.padding_idx is not None or embedding.max_norm is not None:
            raise ValueError(f"{embedding} has padding_idx or max_norm, which cannot be quantized; add its name to quant.float_layers")
        layer = cls()
        layer._parameters["weight"] = embedding.weight  # register_parameter refuses the name of a property
        quantizer = Quantizer(bits.weight, weight_steps=embedding.num_embeddings, range_mode=policy.range_mode)
        layer.weight_quantizer = quantizer.to(embedding.weight.device)
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
    def from_float(cls, op: nn.Module, bits: Bits, policy: QuantConfig) -> Self:
        """Wrapper around `op` itself, not a copy."""
        device = next((p.device for p in op.parameters()), None)
        quantizers = [Quantizer(bits.activation, range_mode=policy.range_mode).to(device) for _ in op.quantized_inputs]
        return cls(op, quantizers).train(op.training)

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


def quantizers(layer: QuantLayer) -> list[Quantizer]:
    """Input quantizers of a layer, then its weight quantizer where it has a weight."""
    return [module for module in layer.modules() if isinstance(module, Quantizer)]


def activation_quantizers(layer: QuantLayer) -> list[Quantizer]:
    """Quantizers of the inputs of a layer; an embedding has none."""
    return [quantizer for quantizer in quantizers(layer) if quantizer.axis is None]


def weight_of(layer: WeightLayer) -> nn.Parameter:
    """The weight that training changes, before it is quantized."""
    return layer._parameters["weight"]


def step_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every learned step, whether its quantizer is on or off. They need an optimizer group of their own, without weight decay."""
    return [module.log_step for module in model.modules() if isinstance(module, Quantizer) and module.learn]
