"""Quantized forms of the leaf modules: convolution, linear layer, and any op that declares `quantized_inputs`.

They keep the float layer's name, parameters and state-dict keys; only the quantizers are new.
"""

from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from qdbev.config import Bits
from qdbev.quant.quantizer import Quantizer


class QuantConv2d(nn.Conv2d):
    """Convolution of a quantized input (one step) with a quantized weight (one step per output channel); the bias stays float."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, conv: nn.Conv2d, bits: Bits, learn: bool) -> Self:
        """Quantized layer around the parameters of `conv`."""
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        layer = cls(*shape, conv.bias is not None, conv.padding_mode, device="meta")
        _adopt(layer, conv, bits, learn)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantLinear(nn.Linear):
    """Linear layer of a quantized input (one step) and a quantized weight (one step per output); the bias stays float."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    @classmethod
    def from_float(cls, linear: nn.Linear, bits: Bits, learn: bool) -> Self:
        """Quantized layer around the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        _adopt(layer, linear, bits, learn)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantOp(nn.Module):
    """An op whose arguments at `op.quantized_inputs` are quantized, one step each. The op should hold no parameters of its own."""

    def __init__(self, op: nn.Module, input_quantizers: list[Quantizer]) -> None:
        super().__init__()
        self.op = op
        self.input_quantizers = nn.ModuleList(input_quantizers)

    @classmethod
    def from_float(cls, op: nn.Module, bits: Bits, learn: bool) -> Self:
        """Wrapper around `op` itself."""
        device = next((p.device for p in op.parameters()), None)
        layer = cls(op, [Quantizer(bits.activation, learn=learn).to(device) for _ in op.quantized_inputs])
        return layer.train(op.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The op's own signature; the quantized arguments are positional."""
        inputs = list(args)
        for index, quantizer in zip(self.op.quantized_inputs, self.input_quantizers, strict=True):
            inputs[index] = quantizer(inputs[index])
        return self.op(*inputs, **kwargs)


QuantLayer = QuantConv2d | QuantLinear | QuantOp


def quant_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """Name and module of every quantized layer, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]


def quantizers(layer: QuantLayer) -> list[Quantizer]:
    """Input quantizers, then the weight quantizer where there is a weight."""
    if isinstance(layer, QuantOp):
        return list(layer.input_quantizers)
    return [layer.input_quantizer, layer.weight_quantizer]


def step_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every learned step, switched on or not. They want an optimizer group of their own, without weight decay."""
    return [module.log_step for module in model.modules() if isinstance(module, Quantizer) and module.learn]


def _adopt(layer: QuantConv2d | QuantLinear, source: nn.Conv2d | nn.Linear, bits: Bits, learn: bool) -> None:
    layer.weight, layer.bias = source.weight, source.bias
    device = source.weight.device
    layer.input_quantizer = Quantizer(bits.activation, learn=learn).to(device)
    layer.weight_quantizer = Quantizer(bits.weight, channels=source.weight.shape[0], learn=learn).to(device)
    layer.train(source.training)
