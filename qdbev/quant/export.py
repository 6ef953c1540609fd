"""Export mode of a quantized model: the same values, computed from constants by operations that ONNX has."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from qdbev.quant.layers import WeightLayer, quant_layers, quantizers, weight_of


@contextlib.contextmanager
def exporting(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context `model` can be traced by torch.onnx.export; afterwards it is as before, also after an error.

    Weights are replaced by their quantized values, so that they need no Clip, and steps by constants, so that no step is computed in the
    graph. Every enabled quantizer becomes QuantizeLinear and DequantizeLinear with int8 storage and zero point 0; a Clip comes first where
    an activation's integers do not fill int8.
    """
    layers = [layer for _, layer in quant_layers(model)]
    weights = [(weight_of(layer), weight_of(layer).data) for layer in layers if isinstance(layer, WeightLayer)]
    try:
        with torch.no_grad():
            for layer in layers:
                _set_constants(layer)
        yield model
    finally:
        for parameter, value in weights:
            parameter.data = value
        for layer in layers:
            for quantizer in quantizers(layer):
                quantizer.export_step = None


def _set_constants(layer: nn.Module) -> None:
    """Replace the weight of `layer` by its quantized values, and the steps of its enabled quantizers by constants."""
    for quantizer in quantizers(layer):
        if quantizer.enabled:
            weight = None if quantizer.axis is None else weight_of(layer)
            step = quantizer.step(weight).flatten()
            if weight is not None:
                weight.data = quantizer(weight)
            quantizer.export_step = (step, torch.zeros_like(step, dtype=torch.int32)) if len(step) > 1 else float(step)
