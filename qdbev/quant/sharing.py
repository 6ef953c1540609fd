"""Layers that read the same tensor share one input quantizer: the tensor is quantized once, and an engine may merge the layers.

TensorRT merges linear layers that read one input only where their input steps are equal, and steps that are learned apart would drift
apart.
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qdbev.quant.layers import QuantConv2d, QuantLinear, quant_layers
from qdbev.quant.quantizer import Quantizer


class InputRecord:
    """Which tensors each quantizer read, as numbers in the order of first use. Tensors are referenced weakly, so their memory is freed."""

    def __init__(self) -> None:
        self.read: dict[Quantizer, list[int]] = defaultdict(list)
        self._known: dict[int, tuple[weakref.ref, int]] = {}
        self._numbers = itertools.count()

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a quantizer."""
        tensor: Tensor = args[0]
        reference, number = self._known.get(id(tensor), (None, -1))
        if reference is None or reference() is not tensor:  # the id of a freed tensor may be used again
            number = next(self._numbers)
            self._known[id(tensor)] = weakref.ref(tensor), number
        self.read[quantizer].append(number)


@contextmanager
def recorded_inputs(model: nn.Module) -> Iterator[InputRecord]:
    """Record which tensors the convolutions and linear layers of `model` read in the forwards inside."""
    record = InputRecord()
    hooks = [layer.input_quantizer.register_forward_pre_hook(record) for layer in _layers(model)]
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def share_input_quantizers(model: nn.Module, record: InputRecord) -> None:
    """Give layers that have the same bits and always read the same tensors one input quantizer, that of the first of them."""
    first: dict[tuple, Quantizer] = {}
    for layer in _layers(model):
        quantizer = layer.input_quantizer
        read = record.read[quantizer]
        if read:
            layer.input_quantizer = first.setdefault((quantizer.num_bits, tuple(read)), quantizer)


def _layers(model: nn.Module) -> list[QuantConv2d | QuantLinear]:
    return [layer for _, layer in quant_layers(model) if isinstance(layer, QuantConv2d | QuantLinear)]
