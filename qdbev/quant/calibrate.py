"""Calibration: run real frames through the float model, then give every quantizer its range."""

from collections.abc import Callable

import torch
from torch import nn

from qdbev.quant.calibrator import RangeCalibrator, weight_amax
from qdbev.quant.config import CalibrationMethod
from qdbev.quant.layers import WeightLayer, quant_layers, weight_of
from qdbev.quant.quantizer import Quantizer, row_amax
from qdbev.quant.sharing import shared_inputs


def calibrate(model: nn.Module, run: Callable[[], None], method: CalibrationMethod) -> None:
    """Give every quantizer of `model` its range and switch all of them on; layers that read the same tensor come to share one.

    Args:
        model: A prepared model in eval mode, so that dropout does not widen the ranges.
        run: Drives the calibration frames through `model`; called once, while all quantizers let tensors through.
        method: `max`, the largest magnitude, or `mse`, the range with the smallest squared error.

    Raises:
        ValueError: The model is in training mode or has no quantizers; or a quantizer, named, saw no data, only zeros, or values
            that are not finite.
    """
    if model.training:
        raise ValueError("calibrate a model in eval mode: call model.eval() first")
    inputs = input_quantizers(model)
    if not inputs:
        raise ValueError("the model has no quantizers; call prepare first")
    with shared_inputs(model):
        _observe(inputs, run)
    inputs = input_quantizers(model)
    ranges = {name: quantizer._calibrator.compute_amax(method) for name, quantizer in inputs.items()}
    for name, quantizer in inputs.items():
        quantizer.set_range(ranges[name], nonnegative=quantizer._calibrator.minimum >= 0)
        quantizer._calibrator = None
    for _, layer in quant_layers(model):
        if isinstance(layer, WeightLayer):
            _fit_weight(layer, method)


def input_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Activation quantizers by the name they have in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer) and module.axis is None}


def _observe(inputs: dict[str, Quantizer], run: Callable[[], None]) -> None:
    for name, quantizer in inputs.items():
        quantizer._calibrator = RangeCalibrator(name, quantizer.num_bits)
        quantizer.disable_quant()
        quantizer._if_calib = True
    try:
        with torch.no_grad():
            run()
    finally:
        for quantizer in inputs.values():
            quantizer._if_calib = False


def _fit_weight(layer: WeightLayer, method: CalibrationMethod) -> None:
    quantizer = layer.weight_quantizer
    rows = quantizer.rows(weight_of(layer))
    amax = weight_amax(rows, quantizer.num_bits, method)
    if quantizer.follows:
        amax = amax / row_amax(rows).clamp_min(torch.finfo(torch.float32).tiny)
    quantizer.set_range(amax)
