"""Does a training hold together? How far ranges have moved, how much of the activations is cut off, whether the loss rises, who went first.

Source of the failure watched for: QD-BEV (arXiv:2308.10515), sections 1 and 3: standard quantization-aware training at 4-bit weights
and 6-bit activations fluctuates and diverges.
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

EVERY = 25
"""Steps between two looks at the quantizers."""
MOVED = 1.0
"""Octaves by which a range must have grown or shrunk to be named."""
CUT = 0.1
"""Share of an activation's values outside its range from which it is named."""
WINDOW = 50
"""Steps whose mean loss is compared with the lowest such mean before."""
ROSE = 1.3
"""Times the lowest mean from which a loss counts as rising."""
_NAMED = 5
_log = logging.getLogger(__name__)


class Watch:
    """Follows one stage of a training; `model` is as the stage begins."""

    def __init__(self, model: nn.Module) -> None:
        self._quantizers = {name: module for name, module in model.named_modules() if isinstance(module, Quantizer) and module.enabled}
        self._start = {name: quantizer.log_step.detach().clone() for name, quantizer in self._quantizers.items() if quantizer.learn}
        self._cut: dict[str, float] = {}
        self._first: dict[str, str] = {}
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._lowest = math.inf
        self._warned = False

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Surround a training step; every `EVERY` steps the shares of values outside the ranges are counted inside."""
        hooks = []
        if step % EVERY == 0:
            activations = {name: quantizer for name, quantizer in self._quantizers.items() if quantizer.axis is None}
            hooks = [quantizer.register_forward_pre_hook(self._counter(name)) for name, quantizer in activations.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def after(self, step: int, loss: float) -> dict[str, Any]:
        """What to log of a step that `around` surrounded; warns once when the loss rises."""
        self._follow(step, loss)
        if step % EVERY or not self._quantizers:
            return {}
        moved = {name: self._octaves(name, start) for name, start in self._start.items()}
        for name, octaves in moved.items():
            if octaves >= MOVED:
                self._first.setdefault(name, f"{name} (step {step + 1}: range moved by {octaves:.1f} octaves)")
        for name, share in self._cut.items():
            if share >= CUT:
                self._first.setdefault(name, f"{name} (step {step + 1}: {share:.0%} of the values outside the range)")
        found: dict[str, Any] = {}
        for kind, values in (("moved", moved), ("cut", self._cut)):
            if values:
                worst = max(values, key=values.__getitem__)
                found |= {kind: values[worst], f"{kind}_by": worst}
        return found

    def summary(self) -> str:
        """Which quantizers went first, for an error message."""
        if not self._first:
            return "no quantizer had left its range by the last look"
        more = f", and {len(self._first) - _NAMED} more" if len(self._first) > _NAMED else ""
        return "quantizers that went first: " + ", ".join(list(self._first.values())[:_NAMED]) + more

    def _follow(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        if len(self._losses) < WINDOW:
            return
        mean = sum(self._losses) / WINDOW
        self._lowest = min(self._lowest, mean)
        if mean > ROSE * self._lowest and not self._warned:
            self._warned = True
            _log.warning(
                "warning: the mean loss of the last %d steps, %.3f at step %d, is %.1f times the lowest so far; %s",
                *(WINDOW, mean, step + 1, mean / self._lowest, self.summary()),
            )

    def _octaves(self, name: str, start: Tensor) -> float:
        """Mean distance of a quantizer's steps from where they began."""
        return float((self._quantizers[name].log_step.detach() - start).abs().mean() / math.log(2))

    def _counter(self, name: str) -> Any:
        def count(quantizer: Quantizer, args: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                x, step = args[0].float(), quantizer.step(args[0])
                qmin, qmax = quantizer.qrange
                self._cut[name] = float(((x < (qmin - 0.5) * step) | (x > (qmax + 0.5) * step)).float().mean())

        return count
