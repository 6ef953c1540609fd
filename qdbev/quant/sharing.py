"""Layers that read the same tensor share one input quantizer: the tensor is quantized once, and an engine may merge their products.

TensorRT merges linear layers over one input only where their input steps are equal; steps learned apart would not stay equal.
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qdbev.quant.layers import QuantConv2d, QuantLinear, quant_layers


@contextmanager
def shared_inputs(model: nn.Module) -> Iterator[None]:
    """Watch the forwards inside; afterwards, layers of one width that always read the same tensor share a quantizer."""
    layers = [layer for _, layer in quant_layers(model) if isinstance(layer, QuantConv2d | QuantLinear)]
    watch = _Watch()
    hooks = [layer.input_quantizer.register_forward_pre_hook(watch) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    leaders: dict[tuple, nn.Module] = {}
    for layer in layers:
        quantizer = layer.input_quantizer
        key = (quantizer.num_bits, tuple(watch.read[quantizer]))
        if watch.read[quantizer]:
            layer.input_quantizer = leaders.setdefault(key, quantizer)


class _Watch:
    """Numbers every tensor that arrives, and remembers by quantizer which ones it read. Tensors are held weakly."""

    def __init__(self) -> None:
        self.read: dict[nn.Module, list[int]] = defaultdict(list)
        self._known: dict[int, tuple[weakref.ref, int]] = {}
        self._numbers = itertools.count()

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        tensor: Tensor = args[0]
        reference, number = self._known.get(id(tensor), (None, -1))
        if reference is None or reference() is not tensor:
            number = next(self._numbers)
            self._known[id(tensor)] = weakref.ref(tensor), number
        self.read[quantizer].append(number)
