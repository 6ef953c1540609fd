"""Ranges from data: a histogram of bounded size for an activation, a search over ranges for a weight."""

from typing import assert_never

import torch
from torch import Tensor

from qdbev.quant.config import CalibrationMethod
from qdbev.quant.quantizer import fake_quantize
from qdbev.quant.range_mode import row_amax

NUM_BINS = 2048
"""Bins of an activation's histogram."""
NUM_RANGES = 512
"""Ranges of an activation that are tried for the smallest squared error: multiples of the largest value divided by this number."""
NUM_WEIGHT_RANGES = 100
"""Ranges of a weight that are tried, in the same way."""


class RangeCalibrator:
    """Histogram of |x| over all collected values of one activation, with their exact minimum and largest magnitude.

    The bins divide 0 to `top`. A larger value doubles `top` until it fits, and each doubling merges neighbouring bins, so that the memory
    stays the same and at least half of the bins are in use. `name` is the quantizer's, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.amax = 0.0
        self.minimum = float("inf")
        self.top = 0.0
        self.counts: Tensor | None = None

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add one activation of any shape. Raises ValueError if it contains an infinity or a NaN."""
        x = x.detach().float()
        low, high = (float(v) for v in x.aminmax())
        amax = max(-low, high)
        if not amax < float("inf"):
            raise ValueError(f"{self.name} saw values from {low} to {high} during calibration; the float model must give finite values")
        self.minimum = min(self.minimum, low)
        self.amax = max(self.amax, amax)
        if self.counts is None:
            if amax == 0:
                return
            self.counts, self.top = torch.zeros(NUM_BINS, dtype=torch.float64, device=x.device), amax
        while self.top < amax:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.top *= 2
        self.counts += torch.histc(x.abs(), bins=NUM_BINS, min=0, max=self.top)

    def compute_amax(self, method: CalibrationMethod, qmax: int) -> Tensor:
        """(1,) end of the range for a quantizer whose largest integer is `qmax`.

        Raises:
            ValueError: Nothing was collected, or nothing but zeros.
        """
        if self.counts is None:
            seen = "no data" if self.minimum == float("inf") else "only zeros"
            raise ValueError(
                f"{self.name} saw {seen} during calibration; use frames that reach the layer, or add the layer to quant.float_layers"
            )
        match method:
            case "max":
                return torch.tensor([self.amax])
            case "mse":
                return self._least_squared_error(qmax)
            case _:
                assert_never(method)

    def _least_squared_error(self, qmax: int) -> Tensor:
        width = self.top / NUM_BINS
        centers = (torch.arange(NUM_BINS, device=self.counts.device) + 0.5) * width  # (NUM_BINS,)
        amaxes = torch.arange(1, NUM_RANGES + 1, device=centers.device) / NUM_RANGES * self.amax
        steps = (amaxes / qmax)[:, None]  # (NUM_RANGES, 1)
        error = fake_quantize(centers.expand(NUM_RANGES, -1), steps, -qmax, qmax) - centers
        loss = (error.double().square() * self.counts).sum(1)  # (NUM_RANGES,)
        return amaxes[loss.argmin()].view(1).cpu()


@torch.no_grad()
def weight_amax(rows: Tensor, method: CalibrationMethod, qmax: int) -> Tensor:
    """(G,) end of the range of each row of (G, N) weights, for a quantizer with integers from -qmax to qmax."""
    match method:
        case "max":
            return row_amax(rows)
        case "mse":
            return _least_squared_error(rows.detach().float(), qmax)
        case _:
            assert_never(method)


def _least_squared_error(rows: Tensor, qmax: int) -> Tensor:
    amax = row_amax(rows)
    best, least = torch.ones_like(amax), torch.full_like(amax, float("inf"))
    for part in range(NUM_WEIGHT_RANGES, 0, -1):
        shrink = part / NUM_WEIGHT_RANGES
        step = (amax * shrink / qmax).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        loss = (fake_quantize(rows, step, -qmax, qmax) - rows).square_().sum(1)  # (G,)
        best = torch.where(loss < least, shrink, best)
        least = torch.minimum(loss, least)
    return amax * best
