"""Quantized forms of the leaf modules: convolution, linear layer, embedding, and any op that declares `quantized_inputs`.

They keep the float layer's name, parameters and state-dict keys; only the quantizers are new.
"""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from qdbev.quant.config import Bits, RangeMode
from qdbev.quant.quantizer import Quantizer


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized."""

    bits: Bits
    range_mode: RangeMode = "step"
    per_channel: bool = True
    """The weight has a step for each channel; False gives it one."""

    def activation(self) -> Quantizer:
        """A quantizer for an input."""
        return Quantizer(self.bits.activation, range_mode=self.range_mode)

    def weight(self, weight: Tensor) -> Quantizer:
        """A quantizer for a weight (C, ...)."""
        return Quantizer(self.bits.weight, weight_steps=weight.shape[0] if self.per_channel else 1, range_mode=self.range_mode).to(
            weight.device
        )


class QuantConv2d(nn.Conv2d):
    """Convolution of a quantized input (one step) with a quantized weight (a step per output channel, or one); the bias stays float."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, conv: nn.Conv2d, spec: LayerSpec) -> Self:
        """Quantized layer around the parameters of `conv`."""
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        layer = cls(*shape, conv.bias is not None, conv.padding_mode, device="meta")
        _adopt(layer, conv, spec)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """Linear layer of a quantized input (one step) and a quantized weight (a step per output, or one); the bias stays float."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: LayerSpec) -> Self:
        """Quantized layer around the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        _adopt(layer, linear, spec)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantEmbedding(nn.Module):
    """Embedding table with a step for each row. `weight` reads as quantized, for networks that use the whole table."""

    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, embedding: nn.Embedding, spec: LayerSpec) -> Self:
        """Quantized table around the parameter of `embedding`.

        Raises:
            ValueError: The embedding pads or renormalises, which reading the whole table does not.
        """
        if embedding.padding_idx is not None or embedding.max_norm is not None:
            raise ValueError(f"{embedding} pads or renormalises its rows; name it in quant.float_layers")
        layer = cls()
        layer._parameters["weight"] = embedding.weight  # register_parameter refuses the name of a property
        layer.weight_quantizer = spec.weight(embedding.weight)
        return layer.train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """(V, C) table on its grid."""
        return self.weight_quantizer(weight_of(self))

    @property
    def num_embeddings(self) -> int:
        """V."""
        return weight_of(self).shape[0]

    def forward(self, indices: Tensor) -> Tensor:
        """(...) rows to (..., C)."""
        return F.embedding(indices, self.weight)


class QuantOp(nn.Module):
    """An op whose arguments at `op.quantized_inputs` are quantized, one step each. The op should hold no parameters of its own."""

    def __init__(self, op: nn.Module, input_quantizers: list[Quantizer]) -> None:
        super().__init__()
        self.op = op
        self.input_quantizers = nn.ModuleList(input_quantizers)

    @classmethod
    def from_float(cls, op: nn.Module, spec: LayerSpec) -> Self:
        """Wrapper around `op` itself."""
        device = next((p.device for p in op.parameters()), None)
        layer = cls(op, [spec.activation().to(device) for _ in op.quantized_inputs])
        return layer.train(op.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The op's own signature; the quantized arguments are positional."""
        inputs = list(args)
        for index, quantizer in zip(self.op.quantized_inputs, self.input_quantizers, strict=True):
            inputs[index] = quantizer(inputs[index])
        return self.op(*inputs, **kwargs)


WeightLayer = QuantConv2d | QuantLinear | QuantEmbedding
QuantLayer = WeightLayer | QuantOp


def quant_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """Name and module of every quantized layer, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]


def activation_quantizers(layer: QuantLayer) -> list[Quantizer]:
    """Quantizers of a layer's inputs; an embedding has none."""
    if isinstance(layer, QuantOp):
        return list(layer.input_quantizers)
    return [] if isinstance(layer, QuantEmbedding) else [layer.input_quantizer]


def quantizers(layer: QuantLayer) -> list[Quantizer]:
    """Input quantizers, then the weight quantizer where there is a weight."""
    weight = [layer.weight_quantizer] if isinstance(layer, WeightLayer) else []
    return activation_quantizers(layer) + weight


def weight_of(layer: WeightLayer) -> nn.Parameter:
    """The parameter that is trained, before it is quantized."""
    return layer._parameters["weight"]


def step_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every learned step, switched on or not. They want an optimizer group of their own, without weight decay."""
    return [module.log_step for module in model.modules() if isinstance(module, Quantizer) and module.learn]


def _adopt(layer: QuantConv2d | QuantLinear, source: nn.Conv2d | nn.Linear, spec: LayerSpec) -> None:
    layer.weight, layer.bias = source.weight, source.bias
    layer.input_quantizer = spec.activation().to(source.weight.device)
    layer.weight_quantizer = spec.weight(source.weight)
    layer.train(source.training)
