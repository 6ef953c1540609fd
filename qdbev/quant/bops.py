"""Bit operations of one forward: weight bits times activation bits times multiply-accumulates, summed over the layers.

Source: the definition of HAWQ-V3 (arXiv:2011.10680), where a float layer counts 32 * 32. Convolutions, linear layers and products of two
activations are counted each time they run, with the shapes of their actual inputs. The sampling of deformable operators, whose weights are
float, is not counted, and neither are norms, softmax and sums, which are few in comparison.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qdbev.quant.layers import QuantLayer, QuantOp, quant_layers, quantizers

FLOAT_BITS = 32
"""Bits of a float value."""
_PRODUCT_OPERANDS = 2
"""Number of quantized inputs by which a matrix product is recognised; an op with one quantized input samples it."""


class Cost(NamedTuple):
    """Multiply-accumulates of one run of one layer, and the bits of its operands: 32 where they are float."""

    name: str
    macs: int
    weight_bits: int
    activation_bits: int

    @property
    def bops(self) -> int:
        """Bit operations of this run of the layer."""
        return self.macs * self.weight_bits * self.activation_bits


def costs(model: nn.Module, run: Callable[[], object]) -> list[Cost]:
    """Costs of all layers of a float or quantized model, in the order in which `run`, which computes one frame, runs them."""
    found: list[Cost] = []
    wrapped = {layer.op for _, layer in quant_layers(model) if isinstance(layer, QuantOp)}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if module not in wrapped and _counts(module):

                def record(layer: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                    found.append(Cost(name, _macs(layer, args, output), *_bits(layer)))

                hooks.enter_context(module.register_forward_hook(record))
        run()
    return found


def bops(found: list[Cost]) -> int:
    """Sum of the bit operations of `found`."""
    return sum(cost.bops for cost in found)


def float_bops(found: list[Cost]) -> int:
    """Bit operations that the layers of `found` would have in float."""
    return sum(cost.macs for cost in found) * FLOAT_BITS**2


def _counts(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d | nn.Linear):
        return True
    op = module.op if isinstance(module, QuantOp) else module
    return len(getattr(type(op), "quantized_inputs", ())) == _PRODUCT_OPERANDS


def _macs(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> int:
    return output.numel() * (layer.weight[0].numel() if isinstance(layer, nn.Conv2d | nn.Linear) else args[0].shape[-1])


def _bits(layer: nn.Module) -> tuple[int, int]:
    """Bits of the weight, or of the first factor of a product, and of the activation."""
    if not isinstance(layer, QuantLayer):
        return FLOAT_BITS, FLOAT_BITS
    activation, weight = (quantizer.num_bits if quantizer.enabled else FLOAT_BITS for quantizer in quantizers(layer))
    return weight, activation
