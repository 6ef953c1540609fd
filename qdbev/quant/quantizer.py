"""Symmetric uniform fake quantization with 2 to 8 bits.

A value x becomes clamp(round(x / step), qmin, qmax) * step. As in ONNX QuantizeLinear, x is divided by the step, not multiplied by its
reciprocal, and halves are rounded to even. The zero point is 0 and every range fits int8. How the step is found and learned is the part of
qdbev/quant/range_mode.py.

Sources: LSQ (arXiv:1902.08153), equations 1 to 3 and section 2.2; PACT (arXiv:1805.06085), equations 1 to 3; TQT (arXiv:1903.08066), which
stores the logarithm of the step, so that the step stays positive and an Adam step changes it by a share of itself. `Quantizer` is built on
TensorQuantizer of NVIDIA's pytorch-quantization 2.1.3.

C channels (axis 0) of a weight; G steps of a quantizer, which is C or 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qdbev.quant.config import RangeMode
from qdbev.quant.range_mode import RANGE_RULES, LearnedStep

SMALLEST_STEP = 1e-10
"""Lower bound of every step, so that nothing is divided by zero where a whole channel is zero."""

STEP_BITS = 4
"""Significant bits of a step; steps are rounded up to them, which widens a range by 12 % at most. At 4 and 6 bits, sums of products of
fake-quantized tensors then fit the 24 significant bits of float32, so that a layer gives the same result in whatever order a library adds,
and the next layer rounds it to the same integer. At 8 bits long sums may need more. Fewer step bits would make values exactly between two
integers frequent."""

CLIP_MARGIN = 1e-3
"""Share of a step by which the backward pass widens the range: the largest weight is the end of a fixed range and would lose its gradient
to the rounding error of one division."""


def fake_quantize(
    x: Tensor, step: Tensor, qmin: int, qmax: int, step_gradient: Callable[..., Tensor] = LearnedStep.step_gradient
) -> Tensor:
    """Round `x` to multiples of `step` between qmin * step and qmax * step; computed in float32 whatever the type of `x`.

    Args:
        x: (...) any floating type.
        step: float32, () or (G, 1, ...); positive.
        step_gradient: Gradient with respect to `step`, in the form of `RangeRule.step_gradient`.

    Returns:
        (...) in the type of `x`. The gradient with respect to `x` passes unchanged inside the range and is zero outside.
    """
    return _FakeQuantize.apply(x, step, qmin, qmax, step_gradient)


class _FakeQuantize(torch.autograd.Function):
    """Saves only input and output, which the layers around it keep anyway, and computes the quotient again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int, step_gradient: Callable[..., Tensor]) -> Tensor:
        y = (x.float() / step).round_().clamp_(qmin, qmax).mul_(step).to(x.dtype)
        ctx.save_for_backward(x, y if ctx.needs_input_grad[1] else None, step)
        ctx.qrange, ctx.step_gradient = (qmin, qmax), step_gradient
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, y, step = ctx.saved_tensors
        qmin, qmax = ctx.qrange
        grad, x = grad.float(), x.float()
        # This is the gradient of a clamp in one pass over memory; aten names it after hardtanh.
        grad_x = torch.ops.aten.hardtanh_backward.default(grad, x / step, qmin - CLIP_MARGIN, qmax + CLIP_MARGIN)
        grad_step = ctx.step_gradient(grad, grad_x, x, y, step, qmax) if ctx.needs_input_grad[1] else None
        return grad_x.to(ctx.saved_tensors[0].dtype), grad_step, None, None, None


class Quantizer(TensorQuantizer):
    """Fake quantization of one tensor: an activation with one step, or a weight with one step for each channel or in all.

    It returns its input unchanged until it has a range (`set_range`, see calibrate.py), and after `disable_quant`. The base class provides
    `forward`, which calls `_quant_forward` while quantization is on, the switch itself, and the properties `num_bits`, `axis`, `unsigned`.

    Args:
        bits: 2 to 8.
        weight_steps: G, which is the number of channels of the weight or 1; None makes a quantizer of an activation.
        range_mode: Selects `range_rule` from `RANGE_RULES`.
    """

    log_step: Tensor
    """(1,) or (G,): natural logarithm of the size that `range_rule` stores; a parameter where it is learned, else a buffer."""

    def __init__(self, bits: int, *, weight_steps: int | None = None, range_mode: RangeMode = "step") -> None:
        axis = None if weight_steps is None else (0,)
        super().__init__(QuantDescriptor(num_bits=bits, axis=axis, calib_method="none"), if_quant=False)
        self.range_rule = RANGE_RULES[range_mode](is_weight=weight_steps is not None)
        self.learn = self.range_rule.learns_step
        """True where the step is a parameter."""
        self.calibrated = False
        self.export_step: float | tuple[Tensor, Tensor] | None = None
        """Set inside `exporting` (export.py): one step, or steps (G,) and zero points (G,) of a weight."""
        log_step = torch.zeros(weight_steps or 1)
        self.log_step = nn.Parameter(log_step, requires_grad=False) if self.learn else nn.Buffer(log_step)

    @property
    def enabled(self) -> bool:
        """True while the quantizer rounds; otherwise it returns its input unchanged."""
        return self._if_quant

    @property
    def qrange(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return self.range_rule.qrange(self.num_bits, nonnegative=self.unsigned)

    def step(self, x: Tensor | None = None) -> Tensor:
        """The step in use, differentiable in `log_step`: () of an activation, (G, 1, ...) of the weight `x` (C, ...)."""
        size = self.range_rule.step(self.log_step.exp(), x)
        step = round_up_mantissa(size.clamp_min(SMALLEST_STEP))
        return step[0] if self.axis is None else step.view(-1, *[1] * (x.dim() - 1))

    def rows(self, weight: Tensor) -> Tensor:
        """(G, N): the values of a weight (C, ...), with those that share a step in one row."""
        return weight.reshape(self.log_step.numel(), -1)

    def set_range(self, amax: Tensor, *, nonnegative: bool = False, weight: Tensor | None = None) -> None:
        """Set the range and switch quantization on.

        Args:
            amax: (1,) or (G,) end of the range.
            nonnegative: True if the tensor has no value below zero.
            weight: The weight (C, ...) of a weight quantizer.
        """
        qmin, qmax = self.range_rule.qrange(self.num_bits, nonnegative=nonnegative)
        self.unsigned = qmin == 0
        step = self.range_rule.size_to_store(amax.detach().float().reshape(self.log_step.shape), weight) / qmax
        with torch.no_grad():
            self.log_step.copy_(step.clamp_min(SMALLEST_STEP).log())
        self.calibrated = True
        self.enable_quant()

    def set_step(self, step: Tensor, weight: Tensor | None = None) -> None:
        """Use exactly `step` (G,), a result of `step()`. A weight quantizer needs its `weight` (C, ...), all multiples of the step."""
        # Stored a little smaller, so that after the rounding error of log and exp `round_up_mantissa` still gives exactly this step.
        smaller = step * (1 - 2.0 ** -(STEP_BITS + 2))
        with torch.no_grad():
            self.log_step.copy_(self.range_rule.size_to_store(smaller, weight).log())

    def integers(self, x: Tensor) -> Tensor:
        """The integers to which fake quantization rounds `x`, as float32 in the shape of `x`; times the step they give its output."""
        return (x.float() / self.step(x)).round_().clamp_(*self.qrange)

    def enable_quant(self) -> None:
        """Quantize from now on. Raises ValueError if there is no range yet."""
        if not self.calibrated:
            raise ValueError("a quantizer without a range cannot be switched on; calibrate the model first")
        super().enable_quant()
        self.log_step.requires_grad_(self.learn)

    def disable_quant(self) -> None:
        """Return inputs unchanged from now on; the range is kept."""
        super().disable_quant()
        self.log_step.requires_grad_(False)

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        """Called by TensorQuantizer.forward while quantization is on."""
        if self.export_step is not None:
            return self._export_forward(inputs)
        if torch.compiler.is_exporting():
            raise RuntimeError("a quantized model is exported inside `with exporting(model):` (qdbev.quant.export)")
        return fake_quantize(inputs, self.step(inputs), *self.qrange, self.range_rule.step_gradient)

    def _export_forward(self, x: Tensor) -> Tensor:
        """The same values, computed by operations that ONNX has: Clip, QuantizeLinear and DequantizeLinear with int8."""
        if isinstance(self.export_step, tuple):
            step, zero_point = self.export_step
            return torch.fake_quantize_per_channel_affine(x, step, zero_point, 0, -128, 127)
        qmin, qmax = self.qrange
        if self.axis is None and (qmin, qmax) != (-128, 127):
            x = torch.clamp(x, qmin * self.export_step, qmax * self.export_step)
        return torch.fake_quantize_per_tensor_affine(x, self.export_step, 0, -128, 127)

    def get_extra_state(self) -> Tensor:
        """(3,) uint8: calibrated, unsigned, enabled. A tensor, so that a state dict contains nothing else."""
        return torch.tensor([self.calibrated, self.unsigned, self.enabled], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`."""
        self.calibrated, self.unsigned, enabled = (bool(flag) for flag in state.tolist())
        super().enable_quant() if enabled else super().disable_quant()
        self.log_step.requires_grad_(self.learn and enabled)

    def extra_repr(self) -> str:
        """Bits, sign, number of steps, kind of range and state, for print(model)."""
        sign = "unsigned" if self.unsigned else "signed"
        state = "on" if self.enabled else "off" if self.calibrated else "not calibrated"
        return f"{self.num_bits} bit {sign}, {self.log_step.numel()} step(s), {self.range_rule.name}, {state}"


def round_up_mantissa(step: Tensor) -> Tensor:
    """`step` rounded up to `STEP_BITS` significant bits, so that no range becomes smaller; the gradient passes unchanged."""
    mantissa, exponent = torch.frexp(step.detach())  # mantissa in 0.5 .. 1
    rounded = torch.ldexp((mantissa * 2**STEP_BITS).ceil() / 2**STEP_BITS, exponent)
    return step + (rounded - step).detach()
