"""Fake quantization: values, gradients, types, state."""

import copy
import math

import numpy as np
import pytest
import torch

from qdbev.quant.config import RangeMode
from qdbev.quant.quantizer import Quantizer, fake_quantize
from qdbev.quant.range_mode import LearnedClip, row_amax

MODES = ("fixed", "clip", "step")


def ready(
    bits: int,
    amax: torch.Tensor,
    *,
    weight_steps: int | None = None,
    range_mode: RangeMode = "step",
    nonnegative: bool = False,
    weight: torch.Tensor | None = None,
) -> Quantizer:
    quantizer = Quantizer(bits, weight_steps=weight_steps, range_mode=range_mode)
    quantizer.set_range(amax, nonnegative=nonnegative, weight=weight)
    return quantizer


def quantize_dequantize(x: torch.Tensor, step: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """QuantizeLinear to int8 and DequantizeLinear in NumPy."""
    step = step.detach().numpy()
    integers = np.clip(np.rint(x.detach().numpy() / step), qmin, qmax).astype(np.int8)
    return torch.from_numpy(integers.astype(np.float32) * step)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_activations_equal_quantize_then_dequantize(bits: int, nonnegative: bool, mode: RangeMode) -> None:
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(bits)) * 2
    x = x.abs() if nonnegative else x
    quantizer = ready(bits, torch.tensor([3.7]), nonnegative=nonnegative, range_mode=mode)
    unsigned = nonnegative and bits < 8
    qmin, qmax = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if mode == "clip" and not unsigned:
        qmin = -qmax  # from -a to a
    assert quantizer.qrange == (qmin, qmax)
    assert qmin >= -128 and qmax <= 127
    step = quantizer.step(x)
    assert step.shape == ()
    assert 1 - 1e-6 < step.item() * qmax / 3.7 < 1.125  # rounded up to four significant bits
    torch.testing.assert_close(quantizer(x), quantize_dequantize(x, step, qmin, qmax), atol=0, rtol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [5, 1])
def test_weights_equal_quantize_then_dequantize(bits: int, mode: RangeMode, steps: int) -> None:
    weight = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(bits))
    amax = weight.abs().amax((1, 2, 3)) if steps == 5 else weight.abs().max().view(1)
    quantizer = ready(bits, amax, weight_steps=steps, range_mode=mode, weight=weight)
    qmax = 2 ** (bits - 1) - 1
    assert quantizer.qrange == (-qmax, qmax)
    step = quantizer.step(weight)
    assert step.shape == (steps, 1, 1, 1)
    widened = step.flatten() * qmax / amax
    assert (widened > 1 - 1e-6).all() and (widened < 1.125 + 1e-6).all()
    torch.testing.assert_close(quantizer(weight), quantize_dequantize(weight, step, -qmax, qmax), atol=0, rtol=0)


def test_products_of_quantized_tensors_add_up_the_same_in_any_order() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 256, generator=g), torch.randn(64, 256, generator=g)
    a = ready(6, x.abs().max().view(1))(x).detach()
    b = ready(4, row_amax(weight), weight_steps=64)(weight).detach()
    exact = (a.double() @ b.double().T).float()
    order = torch.randperm(256, generator=g)
    assert torch.equal(a @ b.T, exact)
    assert torch.equal(a[:, order] @ b[:, order].T, exact)
    assert not torch.equal(x @ weight.T, (x.double() @ weight.double().T).float())  # float tensors do not


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 100.0])
    assert fake_quantize(x, torch.tensor(1.0), -8, 7).tolist() == [0, 2, 2, 0, -2, 7]


def test_division_is_not_a_product_with_the_reciprocal() -> None:
    step = torch.tensor(0.0371)
    ties = (torch.arange(-40, 40) + 0.5) * step
    torch.testing.assert_close(fake_quantize(ties, step, -64, 63), quantize_dequantize(ties, step, -64, 63), atol=0, rtol=0)
    assert ((ties / step).round() != (ties * (1 / step)).round()).any()  # the case tells the two apart


def test_gradient_passes_inside_the_range_and_stops_outside() -> None:
    x = torch.tensor([-9.0, -7.9, 0.3, 6.9, 7.0, 7.1, 50.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), -8, 7).backward(torch.arange(1.0, 8.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0, 0]


def test_the_largest_weight_keeps_its_gradient() -> None:
    weight = torch.randn(64, 100, requires_grad=True)
    for bits in range(2, 9):
        quantizer = ready(bits, row_amax(weight), weight_steps=64, range_mode="fixed", weight=weight)
        (grad,) = torch.autograd.grad(quantizer(weight).sum(), weight)
        assert (grad == 1).all()


@pytest.mark.parametrize("shape", [(), (6, 1, 1)])
def test_step_gradient_is_that_of_the_paper(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(6, 40, 50, generator=generator) * 3, torch.randn(6, 40, 50, generator=generator)
    step = (0.2 + torch.rand(shape, generator=generator)).requires_grad_()
    qmin, qmax = -8, 7
    quotient = (x / step.detach()).double()
    equation_3 = torch.where(quotient <= qmin, qmin, torch.where(quotient >= qmax, qmax, quotient.round() - quotient))
    scale = 1 / math.sqrt(x.numel() / step.numel() * qmax)
    expected = (equation_3 * grad).sum_to_size(shape) * scale
    (actual,) = torch.autograd.grad(fake_quantize(x, step, qmin, qmax), step, grad)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_naive_form() -> None:
    """The reference is autograd of clamp, straight-through round and product, without LSQ's gradient scale."""
    x, step = torch.randn(4, 500) * 4, torch.rand(4, 1).add(0.2)
    near_an_end = torch.minimum((x / step).abs(), (x / step - 15).abs()) < 0.01  # there CLIP_MARGIN widens the range
    x = torch.where(near_an_end, x + 0.5 * step, x).requires_grad_()
    step.requires_grad_()
    clamped = (x / step).clamp(0, 15)
    naive = ((clamped.round() - clamped).detach() + clamped) * step
    grad = torch.randn(4, 500)
    expected_x, expected_step = torch.autograd.grad(naive, (x, step), grad)
    actual_x, actual_step = torch.autograd.grad(fake_quantize(x, step, 0, 15), (x, step), grad)
    torch.testing.assert_close(actual_x, expected_x)
    torch.testing.assert_close(actual_step, expected_step * (500 * 15) ** -0.5, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_learned_clip_is_that_of_its_paper() -> None:
    """PACT's equation 3: the clip gets the sign of values outside and zero inside; values get one inside and zero outside."""
    x = torch.tensor([-9.0, -7.5, -6.6, 0.3, 6.6, 7.5, 50.0], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    clip = torch.tensor(7.0, requires_grad=True)
    y = fake_quantize(x, clip / 7, -7, 7, LearnedClip.step_gradient)
    assert y.tolist() == [-7, -7, -7, 0, 7, 7, 7]
    grad_x, grad_clip = torch.autograd.grad(y, (x, clip), grad)
    assert grad_x.tolist() == [0, 0, 4, 8, 16, 0, 0]
    assert grad_clip.item() == -1 - 2 + 32 + 64
    y = fake_quantize(x, clip / 7, 0, 7, LearnedClip.step_gradient)
    assert torch.autograd.grad(y, clip, grad)[0].item() == 32 + 64


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("steps", [None, 4, 1])
def test_the_gradient_of_a_learned_clip_is_the_slope_of_the_clamp(steps: int | None, nonnegative: bool) -> None:
    """The reference is a finite difference of clamp(x, -a or 0, a), which rounding approximates."""
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(4, 500, generator=g), torch.randn(4, 500, generator=g)
    nonnegative = nonnegative and steps is None
    quantizer = ready(
        4, torch.full((steps or 1,), 15 / 16 if nonnegative else 7 / 8), weight_steps=steps, range_mode="clip", nonnegative=nonnegative
    )
    clip = (quantizer.step(x) * quantizer.qrange[1]).detach().double()
    x[(x.abs() / clip - 1).abs() < 0.01] = 0  # there CLIP_MARGIN widens the range
    (quantizer(x) * grad).sum().backward()

    def loss(factor: float) -> torch.Tensor:
        low = torch.zeros_like(clip) if nonnegative else -clip * factor
        clamped = x.double().clamp(low, clip * factor)
        return (clamped * grad).sum_to_size(clip.shape).flatten()

    slope = (loss(1 + 1e-6) - loss(1 - 1e-6)) / 2e-6  # of the logarithm of the clip, which is also that of the step
    torch.testing.assert_close(quantizer.log_step.grad.double(), slope, rtol=1e-3, atol=1e-3)


def test_a_learned_clip_is_still_while_all_values_lie_inside() -> None:
    for mode, still in (("clip", True), ("step", False)):
        quantizer = ready(4, torch.tensor([4.0]), range_mode=mode)
        quantizer(torch.rand(1000)).sum().backward()
        assert (quantizer.log_step.grad.item() == 0) == still


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [None, 8, 1])
def test_values_outside_the_range_get_no_gradient_in_any_mode(mode: RangeMode, steps: int | None) -> None:
    x = torch.randn(8, 200, requires_grad=True)
    quantizer = ready(4, 0.3 * row_amax(x.view(steps or 1, -1)), weight_steps=steps, range_mode=mode, weight=x)
    (grad,) = torch.autograd.grad(quantizer(x).sum(), x)
    quotient = x / quantizer.step(x)
    qmin, qmax = quantizer.qrange
    inside = (quotient >= qmin) & (quotient <= qmax)
    assert 0.05 < (~inside).float().mean() < 0.5
    assert torch.equal(grad, inside.float())


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_no_value_and_no_gradient_of_a_float32_tensor(mode: RangeMode) -> None:
    x, results = torch.randn(16, 100), []
    for autocast in (False, True):
        leaf = x.clone().requires_grad_()
        quantizer = ready(8, torch.full((16,), 0.7), weight_steps=16, range_mode=mode, weight=x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = quantizer(leaf)
            y.square().sum().backward()
        results.append([y.detach(), leaf.grad, quantizer.step(x).detach(), quantizer.log_step.grad])
    for plain, mixed in zip(*results, strict=True):
        assert plain is mixed is None or (plain.dtype == mixed.dtype == torch.float32 and torch.equal(plain, mixed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["clip", "step"])
def test_half_types_are_quantized_in_float32(dtype: torch.dtype, mode: RangeMode) -> None:
    x = (torch.randn(5000) * 2).to(dtype).requires_grad_()
    quantizer = ready(8, torch.tensor([5.0]), range_mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantizer(x)
        y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y, quantizer(x.float()).to(dtype), atol=0, rtol=0)
    assert quantizer.log_step.grad.dtype == torch.float32


def test_a_fixed_weight_range_follows_the_weight() -> None:
    weight = torch.randn(3, 20)
    fixed = ready(4, 0.8 * row_amax(weight), weight_steps=3, range_mode="fixed", weight=weight)
    learned = ready(4, 0.8 * row_amax(weight), weight_steps=3, range_mode="step")
    torch.testing.assert_close(fixed(weight), learned(weight))
    torch.testing.assert_close(fixed(weight * 8), fixed(weight) * 8)
    assert not torch.allclose(learned(weight * 8), learned(weight) * 8)
    assert list(fixed.parameters()) == []


def test_one_fixed_range_follows_the_largest_value_of_the_whole_weight() -> None:
    weight = torch.tensor([[1.0, 0.2], [-7.0, 3.0]])
    fixed = ready(4, torch.tensor([7.0]), weight_steps=1, range_mode="fixed", weight=weight)
    assert fixed(weight).tolist() == [[1, 0], [-7, 3]]
    weight[1, 0] = 14
    assert fixed(weight).tolist() == [[0, 0], [14, 4]]  # half of a step of 2 rounds to even


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 4, requires_grad=True)
    for mode in MODES:
        y = ready(4, torch.zeros(2), weight_steps=2, range_mode=mode, weight=weight)(weight)
        assert (y == 0).all()
        y.sum().backward()
        assert weight.grad.isfinite().all()


def test_without_a_range_it_lets_tensors_through_and_cannot_be_switched_on() -> None:
    quantizer = Quantizer(4)
    x = torch.randn(10)
    assert quantizer(x) is x
    with pytest.raises(ValueError, match="without a range"):
        quantizer.enable_quant()


def test_switched_off_it_lets_tensors_through_and_its_step_is_not_trained() -> None:
    quantizer, x = ready(4, torch.tensor([1.0])), torch.randn(10)
    assert quantizer.enabled and quantizer.log_step.requires_grad
    quantizer.disable_quant()
    assert quantizer(x) is x
    assert not quantizer.log_step.requires_grad
    quantizer.enable_quant()
    assert not torch.equal(quantizer(x), x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("steps", [None, 6, 1])
def test_a_step_can_be_set_exactly(mode: RangeMode, bits: int, steps: int | None) -> None:
    """The step also stays exact for quantized values, as after packing, and when it is set repeatedly."""
    weight = torch.randn(6, 50) * torch.logspace(-9, 3, 6)[:, None]
    amax = row_amax(weight.view(steps or 1, -1))
    quantizer = ready(bits, 0.6 * amax, weight_steps=steps, range_mode=mode, weight=weight)
    for _ in range(3):
        step = quantizer.step(weight).detach().flatten()
        y = quantizer(weight).detach()
        assert torch.equal(quantizer.integers(weight) * quantizer.step(weight), y)
        quantizer.set_step(step, None if steps is None else y)
        assert torch.equal(quantizer.step(y).flatten(), step)
        assert torch.equal(quantizer(y), y)
        weight = y


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_and_a_reload_behave_the_same(mode: RangeMode) -> None:
    x = torch.rand(100)
    quantizer = ready(4, torch.tensor([0.9]), nonnegative=True, range_mode=mode)
    fresh = Quantizer(4, range_mode=mode)
    fresh.load_state_dict(quantizer.state_dict())
    for other in (copy.deepcopy(quantizer), fresh):
        assert torch.equal(other(x), quantizer(x))
        assert other.qrange == (0, 15)
        assert other.log_step is not quantizer.log_step
        assert other.log_step.requires_grad == (mode != "fixed")
