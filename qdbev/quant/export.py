"""The export mode: the same values, from constants and operations that ONNX has."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from qdbev.quant.layers import WeightLayer, quant_layers, quantizers, weight_of


@contextlib.contextmanager
def exporting(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, `model` may be traced by torch.onnx.export; weights and quantizers are as before afterwards, also after an error.

    Weights lie on their grid (baked), so that they need no Clip, and steps are numbers, so that nothing depends on data. Every
    enabled quantizer becomes [Clip ->] QuantizeLinear -> DequantizeLinear with int8 storage and zero point 0.
    """
    layers = [layer for _, layer in quant_layers(model)]
    weights = [(weight_of(layer), weight_of(layer).data) for layer in layers if isinstance(layer, WeightLayer)]
    try:
        with torch.no_grad():
            for layer in layers:
                _freeze(layer)
        yield model
    finally:
        for parameter, value in weights:
            parameter.data = value
        for layer in layers:
            for quantizer in quantizers(layer):
                quantizer.frozen = None


def _freeze(layer: nn.Module) -> None:
    for quantizer in quantizers(layer):
        if not quantizer.enabled:
            continue
        if quantizer.axis is None:
            quantizer.frozen = float(quantizer.step(quantizer.log_step))
            continue
        weight = weight_of(layer)
        step = quantizer.step(weight).flatten()
        weight.data = quantizer(weight)
        quantizer.frozen = (step, torch.zeros_like(step, dtype=torch.int32)) if len(step) > 1 else float(step)
