"""Calibration: ranges on known distributions, and what is refused."""

import pytest
import torch
from torch import nn

from qdbev.quant.calibrate import calibrate
from qdbev.quant.calibrator import RangeCalibrator, weight_amax
from qdbev.quant.config import Bits, CalibrationMethod, QuantConfig, RangeMode
from qdbev.quant.prepare import prepare
from qdbev.quant.quantizer import fake_quantize


def gaussian(count: int = 200_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def collected(x: torch.Tensor) -> RangeCalibrator:
    calibrator = RangeCalibrator("layer")
    for part in x.chunk(4):
        calibrator.collect(part)
    return calibrator


def squared_error(x: torch.Tensor, amax: float, qmin: int, qmax: int) -> float:
    return (fake_quantize(x, torch.tensor(amax / qmax), qmin, qmax) - x).square().mean().item()


def brute_force(x: torch.Tensor, qmin: int, qmax: int) -> float:
    """Smallest squared error over 1000 ranges."""
    return min(squared_error(x, x.abs().max().item() * i / 1000, qmin, qmax) for i in range(1, 1001))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_mse_finds_the_optimum_of_a_gaussian(bits: int, nonnegative: bool) -> None:
    x = gaussian(50_000)
    x = x.abs() if nonnegative else x
    qmin, qmax = (0, 2**bits - 1) if nonnegative else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    amax = collected(x).compute_amax("mse", qmax).item()
    assert squared_error(x, amax, qmin, qmax) < 1.02 * brute_force(x, qmin, qmax)
    assert amax < x.abs().max()


def test_max_is_exact() -> None:
    x = gaussian()
    assert collected(x).compute_amax("max", 127).item() == x.abs().max().item()


def test_histogram_keeps_its_size_and_counts_when_later_values_are_larger() -> None:
    calibrator = RangeCalibrator("layer")
    for scale in (0.0, 1e-6, 1.0, 1e5):
        calibrator.collect(gaussian(1000) * scale)
    assert calibrator.counts.shape == (2048,)
    assert calibrator.counts.sum() == 3000
    assert calibrator.counts[1024:].any()


def test_minimum_tells_values_after_a_relu() -> None:
    assert collected(gaussian().relu()).minimum == 0
    assert collected(gaussian()).minimum < 0


@pytest.mark.parametrize("bits", [4, 6])
def test_mse_of_weights_is_per_channel(bits: int) -> None:
    weight = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [1.0], [50.0]])
    qmax = 2 ** (bits - 1) - 1
    amax = weight_amax(weight, "mse", qmax)
    for channel, end in zip(weight, amax, strict=True):
        assert squared_error(channel, end.item(), -qmax, qmax) < 1.02 * brute_force(channel, -qmax, qmax)


def test_max_of_weights_is_exact() -> None:
    weight = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight_amax(weight, "max", 127), weight.abs().amax(1))


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("mode", ["fixed", "clip", "step"])
def test_one_step_a_weight_is_fitted_to_the_whole_weight(method: CalibrationMethod, mode: RangeMode) -> None:
    layer = nn.Linear(40, 6)
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight[3] *= 5
    policy = QuantConfig(bits=Bits(weight=4), range_mode=mode, per_channel=False)
    model = prepare(nn.ModuleDict({"head": layer}), policy).eval()
    calibrate(model, lambda: model["head"](torch.randn(10, 40)), method)
    (amax,) = weight_amax(layer.weight.view(1, -1), method, 7)
    step = model["head"].weight_quantizer.step(layer.weight)
    assert step.shape == (1, 1)
    assert 1 - 1e-6 < step.item() * 7 / amax.item() < 1.125


class TwoPaths(nn.Module):
    """A network with a layer that runs and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head["used"](x)


def prepared() -> nn.Module:
    return prepare(TwoPaths(), QuantConfig(bits=Bits(weight=4, activation=6))).eval()


def test_a_layer_without_data_is_refused_by_name() -> None:
    model = prepared()
    with pytest.raises(ValueError, match="head.unused.input_quantizer saw no data"):
        calibrate(model, lambda: model(torch.randn(3, 4)), "max")


def test_a_layer_of_zeros_is_refused_by_name() -> None:
    model = prepared()
    with pytest.raises(ValueError, match="head.used.input_quantizer saw only zeros"):
        calibrate(model, lambda: model(torch.zeros(3, 4)), "mse")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    model = prepared()
    with pytest.raises(ValueError, match="head.used.input_quantizer saw values from"):
        calibrate(model, lambda: model(torch.tensor([[1.0, bad, 0.0, -1.0]])), "max")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calibrating_again_gives_the_same_ranges() -> None:
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), QuantConfig(bits=Bits(weight=2, activation=2))).eval()
    frames = torch.randn(50, 4)
    calibrate(model, lambda: model(frames), "mse")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, lambda: model(frames), "mse")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_in_training_mode_or_without_quantizers_is_refused() -> None:
    with pytest.raises(ValueError, match="eval"):
        calibrate(prepared().train(), lambda: None, "max")
    with pytest.raises(ValueError, match="prepare"):
        calibrate(TwoPaths().eval(), lambda: None, "max")
