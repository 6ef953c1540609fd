"""Bit operations of one forward: weight bits times activation bits times multiply-accumulates, layer by layer.

Source: the definition of HAWQ-V3 (arXiv:2011.10680), where a float layer counts 32 * 32. Convolutions, linear layers and products of two
activations count, with the shapes they really see, each time they run. The samples of deformable operators, whose weights are float,
are left out, as are norms, softmax and sums: beside the products they are few.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qdbev.quant.layers import QuantConv2d, QuantLinear, QuantOp, quant_layers
from qdbev.quant.quantizer import Quantizer

FLOAT_BITS = 32
_PRODUCT_OPERANDS = 2
"""An op with two quantized inputs is their matrix product; one with a single one samples it."""


class Cost(NamedTuple):
    """One layer of one forward; bits are those in use, 32 where it runs in float."""

    name: str
    macs: int
    weight_bits: int
    activation_bits: int

    @property
    def bops(self) -> int:
        """Bit operations."""
        return self.macs * self.weight_bits * self.activation_bits


def costs(model: nn.Module, run: Callable[[], object]) -> list[Cost]:
    """What every layer costs while `run` drives one frame through the float or quantized `model`; in the order they run."""
    found: list[Cost] = []
    hooks = []
    inside = {layer.op for _, layer in quant_layers(model) if isinstance(layer, QuantOp)}
    for name, module in model.named_modules():
        if module not in inside and _counts(module):

            def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                found.append(Cost(name, _macs(layer, args, output), *_bits(layer)))

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def bops(found: list[Cost]) -> int:
    """Bit operations of all layers."""
    return sum(cost.bops for cost in found)


def float_bops(found: list[Cost]) -> int:
    """Bit operations of the same layers in float."""
    return sum(cost.macs for cost in found) * FLOAT_BITS**2


def _counts(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d | nn.Linear):
        return True
    op = module.op if isinstance(module, QuantOp) else module
    return len(getattr(type(op), "quantized_inputs", ())) == _PRODUCT_OPERANDS


def _macs(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> int:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return output.numel() * layer.weight[0].numel()
    return output.numel() * args[0].shape[-1]


def _bits(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, QuantOp):
        first, second = layer.input_quantizers
        return _width(first), _width(second)
    if isinstance(layer, QuantConv2d | QuantLinear):
        return _width(layer.weight_quantizer), _width(layer.input_quantizer)
    return FLOAT_BITS, FLOAT_BITS


def _width(quantizer: Quantizer) -> int:
    return quantizer.num_bits if quantizer.enabled else FLOAT_BITS
