"""How a quantizer treats its range: one class for each value of the setting `quant.range_mode`.

A quantizer stores one size for each step. A class here says which integers there are, how the step follows from the stored size, whether
training learns the stored size, and with which gradient.
To add a way of treating the range, add a class, its name to `RangeMode` in config.py, and an entry to `RANGE_RULES`.

C channels (axis 0) of a weight; G steps of a quantizer, which is C or 1.
"""

from typing import ClassVar

import torch
from torch import Tensor

from qdbev.quant.config import RangeMode


class RangeRule:
    """Base class: the stored size is the step itself, and the range is symmetric for weights."""

    name: ClassVar[str]
    """Short description for printing a model."""
    learns_step: ClassVar[bool] = True
    """True if the stored size is a parameter that training changes."""

    def __init__(self, *, is_weight: bool) -> None:
        self.is_weight = is_weight

    def qrange(self, bits: int, *, nonnegative: bool) -> tuple[int, int]:
        """Smallest and largest integer, (qmin, qmax); both fit int8, the only type to which TensorRT quantizes activations.

        Args:
            bits: 2 to 8.
            nonnegative: The quantizer sees no value below zero. Then the integers are unsigned, except at 8 bits, where 255 does not fit
                int8 and the signed integers are used.
        """
        if nonnegative and bits < 8:
            return 0, 2**bits - 1
        qmax = 2 ** (bits - 1) - 1
        return -qmax if self.is_weight else -qmax - 1, qmax

    def size_to_store(self, size: Tensor, weight: Tensor | None) -> Tensor:
        """(G,) size to store for `size` (G,), a step or the end of a range; inverse of `step`.

        Args:
            weight: The weight (C, ...) of a weight quantizer, None for an activation.
        """
        return size

    def step(self, size: Tensor, weight: Tensor | None) -> Tensor:
        """(G,) step that quantization uses, from the stored `size` (G,); `weight` as in `size_to_store`."""
        return size

    @staticmethod
    def step_gradient(grad: Tensor, grad_x: Tensor, x: Tensor, y: Tensor, step: Tensor, qmax: int) -> Tensor:
        """Gradient of the loss with respect to the step; called only where `learns_step`.

        Args:
            grad: Gradient with respect to `y`; float32, in the shape of `x`.
            grad_x: Gradient with respect to `x`: `grad` inside the range and zero outside.
            x: Float32 values before quantization.
            y: Values after quantization, a multiple of the step each.
            step: () or (G, 1, ...).
            qmax: Largest integer.

        Returns:
            A new tensor in the shape of `step`.
        """
        raise NotImplementedError


class FixedRange(RangeRule):
    """Nothing is learned: an activation keeps its calibrated range, and the range of a weight tracks its largest magnitude (QD-BEV).

    For a weight the stored size is a share of the largest magnitude of the values that share the step.
    """

    name = "fixed range"
    learns_step = False

    def size_to_store(self, size: Tensor, weight: Tensor | None) -> Tensor:
        """For a weight, `size` as a share of its largest magnitude; for an activation, `size` itself."""
        return size / self._largest(size, weight).clamp_min(torch.finfo(torch.float32).tiny) if self.is_weight else size

    def step(self, size: Tensor, weight: Tensor | None) -> Tensor:
        """Inverse of `size_to_store`."""
        return size * self._largest(size, weight) if self.is_weight else size

    @staticmethod
    def _largest(size: Tensor, weight: Tensor) -> Tensor:
        return row_amax(weight.reshape(len(size), -1))


class LearnedStep(RangeRule):
    """The step is learned by the gradient of LSQ (arXiv:1902.08153)."""

    name = "learned step"

    @staticmethod
    def step_gradient(grad: Tensor, grad_x: Tensor, x: Tensor, y: Tensor, step: Tensor, qmax: int) -> Tensor:
        """LSQ's equation 3, times its gradient scale 1 / sqrt(elements per step * qmax) of section 2.2."""
        # Equation 3 is q * grad - v * grad_x, with the rounded quotient q = y / step and the plain quotient v = x / step.
        grad_step = (y * grad).addcmul_(x, grad_x, value=-1).sum_to_size(step.shape) / step
        grad_step *= (x.numel() / step.numel() * qmax) ** -0.5
        return grad_step


class LearnedClip(RangeRule):
    """The end of the range is learned by the gradient of PACT (arXiv:1805.06085).

    PACT clips to 0 .. a; for signed values the lower end is -a. The clip a is step * qmax, so one parameter describes both.
    """

    name = "learned clip"

    def qrange(self, bits: int, *, nonnegative: bool) -> tuple[int, int]:
        """As in the base class, but signed activations are symmetric too."""
        qmin, qmax = super().qrange(bits, nonnegative=nonnegative)
        return max(qmin, -qmax), qmax

    @staticmethod
    def step_gradient(grad: Tensor, grad_x: Tensor, x: Tensor, y: Tensor, step: Tensor, qmax: int) -> Tensor:
        """`qmax` times PACT's equation 3: the sum of the signs of the values outside the range, and nothing from those inside."""
        return (grad - grad_x).mul_(y).sum_to_size(step.shape) / step  # where grad - grad_x is not zero, y / step is qmin or qmax


RANGE_RULES: dict[RangeMode, type[RangeRule]] = {"fixed": FixedRange, "clip": LearnedClip, "step": LearnedStep}
"""Class for each value of the setting `quant.range_mode`."""


def row_amax(rows: Tensor) -> Tensor:
    """(G,) largest magnitude of each row of (G, N) values, without a gradient."""
    return rows.detach().float().abs().amax(1)
