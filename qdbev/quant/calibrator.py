"""Ranges from data: a histogram of bounded size for activations, an exhaustive search for weights."""

import torch
from torch import Tensor

from qdbev.quant.config import CalibrationMethod
from qdbev.quant.quantizer import fake_quantize, row_amax

NUM_BINS = 2048
"""Bins of an activation's histogram."""
NUM_RANGES = 512
"""Ranges of an activation tried in the search for the smallest squared error: equal parts of the largest value."""
NUM_WEIGHT_RANGES = 100
"""The same for a weight."""


class RangeCalibrator:
    """Histogram of |x| over everything collected, with the exact largest magnitude and minimum.

    The bins span 0 to `top`. A larger value doubles `top` until it fits, merging neighbouring bins, so memory stays the same and at
    least half of the bins are in use.
    """

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.bits = bits
        self.amax = 0.0
        self.minimum = float("inf")
        self.top = 0.0
        self.counts: Tensor | None = None

    @property
    def empty(self) -> bool:
        """True until something was collected."""
        return self.minimum == float("inf")

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add one activation of any shape.

        Raises:
            ValueError: It holds an infinity or a NaN.
        """
        x = x.detach().float()
        low, high = (float(v) for v in x.aminmax())
        amax = max(-low, high)
        if not amax < float("inf"):
            raise ValueError(f"{self.name} saw values from {low} to {high} during calibration; the float model must be finite")
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

    def compute_amax(self, method: CalibrationMethod) -> Tensor:
        """(1,) end of the range.

        Raises:
            ValueError: Nothing was collected, or nothing but zeros.
        """
        if self.counts is None:
            seen = "no data" if self.empty else "only zeros"
            raise ValueError(
                f"{self.name} saw {seen} during calibration; run frames that reach the layer, or name it in quant.float_layers"
            )
        if method == "max":
            return torch.tensor([self.amax])
        return self._least_squared_error()

    def _least_squared_error(self) -> Tensor:
        width = self.top / NUM_BINS
        centers = (torch.arange(NUM_BINS, device=self.counts.device) + 0.5) * width  # (NUM_BINS,)
        unsigned = self.minimum >= 0 and self.bits < 8
        qmax = 2 ** (self.bits - (0 if unsigned else 1)) - 1
        amaxes = torch.arange(1, NUM_RANGES + 1, device=centers.device) / NUM_RANGES * self.amax
        steps = (amaxes / qmax)[:, None]  # (NUM_RANGES, 1)
        error = fake_quantize(centers.expand(NUM_RANGES, -1), steps, -qmax, qmax) - centers
        loss = (error.double().square() * self.counts).sum(1)  # (NUM_RANGES,)
        return amaxes[loss.argmin()].view(1).cpu()


@torch.no_grad()
def weight_amax(rows: Tensor, bits: int, method: CalibrationMethod) -> Tensor:
    """(G,) end of the range of each row of (G, N) weights."""
    amax = row_amax(rows)
    if method == "mse":
        return amax * _least_squared_shrink(rows.detach().float(), amax, 2 ** (bits - 1) - 1)
    return amax


def _least_squared_shrink(rows: Tensor, amax: Tensor, qmax: int) -> Tensor:
    """(G,) share of `amax` (G,) with the smallest squared error of the weights (G, N)."""
    best = torch.ones_like(amax)
    least = torch.full_like(amax, float("inf"))
    for part in range(NUM_WEIGHT_RANGES, 0, -1):
        shrink = part / NUM_WEIGHT_RANGES
        step = (amax * shrink / qmax).clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        loss = (fake_quantize(rows, step, -qmax, qmax) - rows).square_().sum(1)  # (G,)
        best = torch.where(loss < least, shrink, best)
        least = torch.minimum(loss, least)
    return best
