"""Monitors quantization-aware training: drift of the learned steps, share of clipped activations, and a rising loss.

When a training diverges, the monitor names the quantizers that became unstable first. Source of the failure: QD-BEV (arXiv:2308.10515),
sections 1 and 3, where standard quantization-aware training at 4-bit weights and 6-bit activations fluctuates and diverges.
"""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdbev.quant.quantizer import Quantizer

CHECK_EVERY = 25
"""Training steps between two checks of the quantizers."""
MAX_DRIFT = 1.0
"""Octaves by which a learned quantization step may grow or shrink before its quantizer counts as unstable."""
MAX_CLIPPED = 0.1
"""Share of an activation's values outside the quantizer's range from which the quantizer counts as unstable."""
WINDOW = 50
"""Training steps whose mean loss is compared with the lowest earlier mean of as many steps."""
RISING = 1.3
"""Ratio of the mean loss to the lowest earlier mean from which the loss counts as rising."""
_NUM_NAMED = 5
"""Largest number of quantizers that a message names."""
_log = logging.getLogger(__name__)


class DivergenceError(FloatingPointError, ValueError):
    """Raised when the loss or a gradient is no longer finite."""


class QuantizerMonitor:
    """Monitors the enabled quantizers of a model through one stage of training, at whose beginning it must be made."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules() if isinstance(module, Quantizer) and module.enabled}
        self._start = {quantizer: quantizer.log_step.detach().clone() for quantizer in self._names if quantizer.learn}
        self._clipped: dict[str, float] = {}
        self._unstable: dict[str, str] = {}
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._lowest = math.inf
        self._warned = False

    @contextlib.contextmanager
    def collect(self, step: int) -> Iterator[None]:
        """Run a training step inside this context; every `CHECK_EVERY` steps it counts the clipped values of all activations.

        Raises:
            DivergenceError: The step raised it; the message also names the quantizers that became unstable first.
        """
        with contextlib.ExitStack() as hooks:
            for quantizer in self._names:
                if step % CHECK_EVERY == 0 and quantizer.axis is None:
                    hooks.enter_context(quantizer.register_forward_pre_hook(self._count_clipped))
            try:
                yield
            except DivergenceError as error:
                raise DivergenceError(f"{error}; {self.summary()}") from error

    def log(self, step: int, loss: float) -> dict[str, Any]:
        """Return the values to log after a step that ran inside `collect`; warns once when the loss rises.

        Returns:
            Every `CHECK_EVERY` steps, `step_drift_octaves` and `clipped_share` of the worst quantizer, each with the quantizer's name.
        """
        self._check_loss(step, loss)
        if step % CHECK_EVERY:
            return {}
        drift = {self._names[q]: float((q.log_step.detach() - start).abs().mean() / math.log(2)) for q, start in self._start.items()}
        found: dict[str, Any] = {}
        for kind, unit, values, limit, effect in (
            ("step_drift", "octaves", drift, MAX_DRIFT, "quantization step changed by {:.1f} octaves"),
            ("clipped", "share", self._clipped, MAX_CLIPPED, "{:.0%} of the values outside the range"),
        ):
            for name, value in values.items():
                if value >= limit:
                    self._unstable.setdefault(name, f"{name} (step {step + 1}: {effect.format(value)})")
            if values:
                worst = max(values, key=values.__getitem__)
                found |= {f"{kind}_{unit}": values[worst], f"{kind}_quantizer": worst}
        return found

    def summary(self) -> str:
        """Name the quantizers that became unstable first, for an error message."""
        if not self._unstable:
            return "no quantizer was unstable at the last check"
        more = f", and {len(self._unstable) - _NUM_NAMED} more" if len(self._unstable) > _NUM_NAMED else ""
        return "first unstable quantizers: " + ", ".join(list(self._unstable.values())[:_NUM_NAMED]) + more

    def _check_loss(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        if len(self._losses) < WINDOW:
            return
        mean = sum(self._losses) / WINDOW
        self._lowest = min(self._lowest, mean)
        if mean > RISING * self._lowest and not self._warned:
            self._warned = True
            _log.warning(
                "warning: the mean loss of the last %d steps, %.3f at step %d, is %.1f times the lowest so far; %s",
                *(WINDOW, mean, step + 1, mean / self._lowest, self.summary()),
            )

    @torch.no_grad()
    def _count_clipped(self, quantizer: Quantizer, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of a quantizer of an activation."""
        x, step = args[0].float(), quantizer.step(args[0])
        qmin, qmax = quantizer.qrange
        self._clipped[self._names[quantizer]] = float(((x < (qmin - 0.5) * step) | (x > (qmax + 0.5) * step)).float().mean())
