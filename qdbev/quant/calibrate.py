"""Calibration: run real frames through the float model, let layers that read the same tensor share a quantizer, and set all ranges.

A shared tensor is quantized once. TensorRT merges linear layers that read one input only where their input steps are equal, and steps that
are learned apart would drift apart.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qdbev.quant.calibrator import RangeCalibrator, weight_amax
from qdbev.quant.config import CalibrationMethod
from qdbev.quant.layers import QuantConv2d, QuantLinear, WeightLayer, quant_layers, weight_of
from qdbev.quant.quantizer import Quantizer


def calibrate(model: nn.Module, run: Callable[[], object], method: CalibrationMethod) -> None:
    """Give every quantizer of `model` its range and switch all of them on; layers that read the same tensor share a quantizer afterwards.

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
    quantizers = {module: name for name, module in model.named_modules() if isinstance(module, Quantizer)}
    calibrators = {quantizer: RangeCalibrator(name) for quantizer, name in quantizers.items() if quantizer.axis is None}
    if not calibrators:
        raise ValueError("the model has no quantizers; call prepare first")
    for quantizer in quantizers:
        quantizer.disable_quant()
    read = _run_observed(run, calibrators)
    _set_input_ranges(calibrators, method)
    for _, layer in quant_layers(model):
        if isinstance(layer, WeightLayer):
            quantizer, weight = layer.weight_quantizer, weight_of(layer)
            quantizer.set_range(weight_amax(quantizer.rows(weight), method, quantizer.qrange[1]), weight=weight)
    _share_input_quantizers(model, read)


def _run_observed(run: Callable[[], object], calibrators: dict[Quantizer, RangeCalibrator]) -> dict[Quantizer, list[int]]:
    """Collect what each quantizer reads during `run`; returns the tensors that each of them read, as numbers that stand for one tensor."""
    read: dict[Quantizer, list[int]] = {quantizer: [] for quantizer in calibrators}
    numbers, count = WeakTensorKeyDictionary(), itertools.count()  # weak, so that the memory of the tensors is freed

    def observe(quantizer: Quantizer, args: tuple[Tensor]) -> None:
        calibrators[quantizer].collect(args[0])
        read[quantizer].append(numbers.setdefault(args[0], next(count)))

    with ExitStack() as hooks, torch.no_grad():
        for quantizer in calibrators:
            hooks.enter_context(quantizer.register_forward_pre_hook(observe))
        run()
    return read


def _set_input_ranges(calibrators: dict[Quantizer, RangeCalibrator], method: CalibrationMethod) -> None:
    ranges: dict[Quantizer, tuple[Tensor, bool]] = {}
    for quantizer, calibrator in calibrators.items():
        nonnegative = calibrator.minimum >= 0
        _, qmax = quantizer.range_rule.qrange(quantizer.num_bits, nonnegative=nonnegative)
        ranges[quantizer] = calibrator.compute_amax(method, qmax), nonnegative
    for quantizer, (amax, nonnegative) in ranges.items():  # after all ranges are known to exist
        quantizer.set_range(amax, nonnegative=nonnegative)


def _share_input_quantizers(model: nn.Module, read: dict[Quantizer, list[int]]) -> None:
    """Give layers that have the same bits and always read the same tensors one input quantizer, that of the first of them."""
    first: dict[tuple[int, ...], Quantizer] = {}
    for _, layer in quant_layers(model):
        if isinstance(layer, QuantConv2d | QuantLinear):
            quantizer = layer.input_quantizer
            layer.input_quantizer = first.setdefault((quantizer.num_bits, *read[quantizer]), quantizer)
