"""Symmetric uniform fake quantization of 2 to 8 bits, with a fixed range, a learned step or a learned clip.

A value x becomes clamp(round(x / step), qmin, qmax) * step: divided, not multiplied by a reciprocal, and rounded half to even, as
ONNX QuantizeLinear does. The zero point is 0 and every range fits int8, the only integer type TensorRT quantizes activations to.

Sources: LSQ (arXiv:1902.08153), equations 1 to 3 and section 2.2; PACT (arXiv:1805.06085), equations 1 to 3, with a lower end -a where
values are signed: y is clamp(x, -a or 0, a) on a grid of step a / qmax, so that the clip a is qmax steps and both are one parameter.
It is learned through its logarithm, as TQT does (arXiv:1903.08066), so that it stays positive and an Adam step changes it by a share
of itself. Built on TensorQuantizer of NVIDIA's pytorch-quantization 2.1.3.

C channels (axis 0) of a weight; G steps, which is C or 1.
"""

from typing import Any, Literal

import torch
from pytorch_quantization.nn import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qdbev.quant.config import RangeMode

SMALLEST_STEP = 1e-10
"""Floor of a step, so that a channel of zeros divides by something."""

STEP_BITS = 4
"""Significant bits of a step. At 4 and 6 bits, products of fake-quantized tensors and sums of them then fit float32's 24 bits, so that a
layer comes out the same in whatever order a library adds, where a step of full precision lets a last bit, and then a rounding, differ.
At 8 bits long sums may still need more. The range grows by 12 % at most. Fewer bits make exact ties frequent."""

EDGE = 1e-3
"""Share of a step by which the range is widened in the backward pass: the largest weight lies on the end of a fixed range and would
lose its gradient to the rounding of one division."""


def fake_quantize(x: Tensor, step: Tensor, qmin: int, qmax: int, learn: Literal["clip", "step"] = "step") -> Tensor:
    """`x` rounded to multiples of `step` between `qmin` and `qmax`, computed in float32 whatever the type of `x`.

    Args:
        x: (...) any floating type.
        step: float32, () or (G, 1, ...); positive.
        learn: Whose gradient `step` gets.

    Returns:
        (...) in the type of `x`. The gradient of `x` passes inside the range and is zero outside. That of `step` under `step` is LSQ's
        equation 3, times the gradient scale 1 / sqrt(elements per step * qmax). Under `clip` it is qmax times PACT's equation 3 for the
        clip a = qmax * step: the sum of the signs of what lies outside, and zero inside.
    """
    return _FakeQuantize.apply(x, step, qmin, qmax, learn)


class _FakeQuantize(torch.autograd.Function):
    """Saves only the input and the output, which the layers around hold anyway, and recomputes the quotient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, qmin: int, qmax: int, learn: str) -> Tensor:
        y = (x.float() / step).round_().clamp_(qmin, qmax).mul_(step).to(x.dtype)
        ctx.save_for_backward(x, y if ctx.needs_input_grad[1] else None, step)
        ctx.qrange, ctx.learn = (qmin, qmax), learn
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, y, step = ctx.saved_tensors
        qmin, qmax = ctx.qrange
        grad, x = grad.float(), x.float()
        # The gradient of a clamp in one pass; aten names it after hardtanh.
        grad_x = torch.ops.aten.hardtanh_backward.default(grad, x / step, qmin - EDGE, qmax + EDGE)
        grad_step = None
        if ctx.needs_input_grad[1] and ctx.learn == "clip":
            grad_step = (grad - grad_x).mul_(y).sum_to_size(step.shape) / step  # y / step is an end of the range wherever this is not zero
        elif ctx.needs_input_grad[1]:
            # Equation 3 with q the rounded and v the plain quotient, q * grad - v * grad_x, where q is y / step and v is x / step.
            grad_step = (y * grad).addcmul_(x, grad_x, value=-1).sum_to_size(step.shape) / step
            grad_step *= (x.numel() / step.numel() * qmax) ** -0.5
        return grad_x.to(ctx.saved_tensors[0].dtype), grad_step, None, None, None


class Quantizer(TensorQuantizer):
    """Fake quantization of one tensor: an activation with one step, or a weight with a step per channel or one.

    It lets its input through until it has a range (`set_range`, see calibrate.py), and whenever `disable_quant` was called. An
    activation whose calibrated minimum is not negative is unsigned, 0 to 2**bits - 1; except at 8 bits, where 255 does not fit
    int8 and the positive half of the signed range serves. Weights, and whatever has a learned clip, use the range without its
    lowest value.

    The base class gives enable_quant, disable_quant, enable_calib and the calibrator slot; range, arithmetic, export and state are
    this class's own.

    Args:
        bits: 2 to 8.
        weight_steps: G, the number of channels of the weight or 1; None makes an activation quantizer.
        range_mode: Under `clip` and `step` the step is a parameter. Under `fixed` an activation keeps its calibrated step, and a weight's
            step follows the largest value of its channel, or of the whole weight, while the weight trains.
    """

    log_step: Tensor
    """(1,) or (G,): natural logarithm of the step; of the step of a unit range where `follows`."""

    def __init__(self, bits: int, *, weight_steps: int | None = None, range_mode: RangeMode = "step") -> None:
        axis = None if weight_steps is None else (0,)
        narrow = weight_steps is not None or range_mode == "clip"
        super().__init__(QuantDescriptor(num_bits=bits, axis=axis, narrow_range=narrow, calib_method="none"), if_quant=False)
        self._calibrator = None
        self.range_mode = range_mode
        self.calibrated = False
        self.frozen: float | tuple[Tensor, Tensor] | None = None
        """Set inside `exporting` (export.py): one step, or step (G,) and zero point (G,) of a baked weight."""
        log_step = torch.zeros(weight_steps or 1)
        if self.learn:
            self.log_step = nn.Parameter(log_step, requires_grad=False)
        else:
            self.register_buffer("log_step", log_step)

    @property
    def learn(self) -> bool:
        """True where the step is a parameter."""
        return self.range_mode != "fixed"

    @property
    def follows(self) -> bool:
        """True for a weight with a fixed range."""
        return self._axis is not None and not self.learn

    @property
    def enabled(self) -> bool:
        """True while the quantizer rounds; it lets tensors through otherwise."""
        return self._if_quant

    @property
    def qrange(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        if self._unsigned:
            return 0, 2**self._num_bits - 1
        qmax = 2 ** (self._num_bits - 1) - 1
        return -qmax - (not self._narrow_range), qmax

    def step(self, x: Tensor) -> Tensor:
        """() or (G, 1, ...) step for the tensor `x`; differentiable in `log_step`."""
        step = self.log_step.exp()
        if self.follows:
            step = step * row_amax(self.rows(x))
        step = shortened(step.clamp_min(SMALLEST_STEP))
        return step[0] if self._axis is None else step.view(-1, *[1] * (x.dim() - 1))

    def rows(self, weight: Tensor) -> Tensor:
        """(G, N): the values of a weight (C, ...) that share a step, in rows."""
        return weight.reshape(self.log_step.numel(), -1)

    def set_range(self, amax: Tensor, *, nonnegative: bool = False) -> None:
        """Take a range and switch quantization on.

        Args:
            amax: (1,) or (G,) largest magnitude; where `follows`, as a share of the largest value.
            nonnegative: No value of the tensor is below zero.
        """
        self._unsigned = nonnegative and self._num_bits < 8
        step = amax.detach().float().reshape(self.log_step.shape) / self.qrange[1]
        with torch.no_grad():
            self.log_step.copy_(step.clamp_min(SMALLEST_STEP).log())
        self.calibrated = True
        self.enable_quant()

    def set_step(self, step: Tensor, weight: Tensor | None = None) -> None:
        """Use exactly `step` (G,), a result of `step()`; for a weight that lies on its grid of that step."""
        inside = step * (1 - 2.0 ** -(STEP_BITS + 2))  # safely between the step below, which `shortened` leaves, and this one
        if weight is not None and self.follows:
            inside = inside / row_amax(self.rows(weight)).clamp_min(torch.finfo(torch.float32).tiny)
        with torch.no_grad():
            self.log_step.copy_(inside.log())

    def integers(self, x: Tensor) -> Tensor:
        """float32, shape of `x`: its value in steps, which fake quantization multiplies by the step again."""
        return (x.float() / self.step(x)).round_().clamp_(*self.qrange)

    def enable_quant(self) -> None:
        """Quantize from now on.

        Raises:
            ValueError: There is no range yet.
        """
        if not self.calibrated:
            raise ValueError("a quantizer without a range cannot be switched on; calibrate the model first")
        super().enable_quant()
        self.log_step.requires_grad_(self.learn)

    def disable_quant(self) -> None:
        """Let tensors through from now on; the range is kept."""
        super().disable_quant()
        self.log_step.requires_grad_(False)

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        """The body of TensorQuantizer.forward, which calls it where quantization is on."""
        if self.frozen is not None:
            return self._export_forward(inputs)
        if torch.compiler.is_exporting():
            raise RuntimeError("a quantized model is exported inside `with exporting(model):` (qdbev.quant.export)")
        return fake_quantize(inputs, self.step(inputs), *self.qrange, "clip" if self.range_mode == "clip" else "step")

    def _export_forward(self, x: Tensor) -> Tensor:
        """The same values from operations that ONNX has: Clip, QuantizeLinear and DequantizeLinear of int8."""
        if isinstance(self.frozen, tuple):
            step, zero_point = self.frozen
            return torch.fake_quantize_per_channel_affine(x, step, zero_point, 0, -128, 127)
        qmin, qmax = self.qrange
        if self._axis is None and (qmin, qmax) != (-128, 127):
            x = torch.clamp(x, qmin * self.frozen, qmax * self.frozen)
        return torch.fake_quantize_per_tensor_affine(x, self.frozen, 0, -128, 127)

    def get_extra_state(self) -> Tensor:
        """(3,) uint8: calibrated, unsigned, enabled. A tensor, so that a state dict holds nothing else."""
        return torch.tensor([self.calibrated, self._unsigned, self._if_quant], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`."""
        self.calibrated, self._unsigned, self._if_quant = (bool(flag) for flag in state.tolist())
        self.log_step.requires_grad_(self.learn and self._if_quant)

    def extra_repr(self) -> str:
        """Width, sign, range and state, for print(model)."""
        sign = "unsigned" if self._unsigned else "signed"
        kind = f"learned {self.range_mode}" if self.learn else "follows weight" if self.follows else "fixed"
        state = "on" if self._if_quant else "off" if self.calibrated else "not calibrated"
        return f"{self._num_bits} bit {sign}, {self.log_step.numel()} step(s), {kind}, {state}"


def shortened(step: Tensor) -> Tensor:
    """`step` rounded up to `STEP_BITS` significant bits, so that the range covers what it did; the gradient passes unchanged."""
    mantissa, exponent = torch.frexp(step.detach())  # mantissa in 0.5 .. 1
    short = torch.ldexp((mantissa * 2**STEP_BITS).ceil() / 2**STEP_BITS, exponent)
    return step + (short - step).detach()


def row_amax(rows: Tensor) -> Tensor:
    """(G,) largest magnitude of each row of (G, N) values; carries no gradient."""
    return rows.detach().float().abs().amax(1)
