"""Calibration: run real frames through the float model, let layers that read the same tensor share a quantizer, and set all ranges."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qdbev.quant.calibrator import RangeCalibrator, weight_amax
from qdbev.quant.config import CalibrationMethod
from qdbev.quant.layers import WeightLayer, quant_layers, weight_of
from qdbev.quant.quantizer import Quantizer
from qdbev.quant.sharing import recorded_inputs, share_input_quantizers


def calibrate(model: nn.Module, run: Callable[[], object], method: CalibrationMethod) -> None:
    """Give every quantizer of `model` its range and switch all of them on; layers that read the same tensor share a quantizer afterwards.

    Both come from one run over the frames: the histograms of all activations, and the record of which layer reads which tensor.

    Args:
        model: A prepared model in eval mode, so that dropout does not widen the ranges.
        run: Runs the calibration frames through `model`; called once, with all quantizers off.
        method: `max`, the largest magnitude, or `mse`, the range with the smallest squared error.

    Raises:
        ValueError: The model is in training mode or has no quantizers; or a quantizer, which the message names, saw no data, only zeros,
            or values that are not finite.
    """
    if model.training:
        raise ValueError("calibrate a model in eval mode: call model.eval() first")
    if not _input_quantizers(model):
        raise ValueError("the model has no quantizers; call prepare first")
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.disable_quant()
    with _collected_histograms(model) as calibrators, recorded_inputs(model) as record, torch.no_grad():
        run()
    share_input_quantizers(model, record)
    _set_input_ranges(model, calibrators, method)
    _set_weight_ranges(model, method)


@contextmanager
def _collected_histograms(model: nn.Module) -> Iterator[dict[Quantizer, RangeCalibrator]]:
    """Collect the activations of the forwards inside, in one calibrator for each input quantizer."""
    calibrators = {quantizer: RangeCalibrator(name) for name, quantizer in _input_quantizers(model).items()}
    hooks = [
        quantizer.register_forward_pre_hook(lambda _, args, calibrator=calibrator: calibrator.collect(args[0]))
        for quantizer, calibrator in calibrators.items()
    ]
    try:
        yield calibrators
    finally:
        for hook in hooks:
            hook.remove()


def _set_input_ranges(model: nn.Module, calibrators: dict[Quantizer, RangeCalibrator], method: CalibrationMethod) -> None:
    ranges: dict[Quantizer, tuple[torch.Tensor, bool]] = {}
    for quantizer in _input_quantizers(model).values():
        calibrator = calibrators[quantizer]
        nonnegative = calibrator.minimum >= 0
        _, qmax = quantizer.range_rule.qrange(quantizer.num_bits, nonnegative=nonnegative)
        ranges[quantizer] = calibrator.compute_amax(method, qmax), nonnegative
    for quantizer, (amax, nonnegative) in ranges.items():  # after all ranges are known to exist
        quantizer.set_range(amax, nonnegative=nonnegative)


def _set_weight_ranges(model: nn.Module, method: CalibrationMethod) -> None:
    for _, layer in quant_layers(model):
        if isinstance(layer, WeightLayer):
            quantizer, weight = layer.weight_quantizer, weight_of(layer)
            quantizer.set_range(weight_amax(quantizer.rows(weight), method, quantizer.qrange[1]), weight=weight)


def _input_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Quantizers of activations by their names in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer) and module.axis is None}
