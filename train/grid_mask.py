"""Masks all camera images of a training step with a grid of zeroed squares.

Source: GridMask (arXiv:2001.04086) as in bevformer utils/grid_mask.py at 66b65f3: stripes are kept and the squares between them are zeroed.
"""

import numpy as np
import torch
from torch import Tensor


def grid_mask(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Mask images (..., H, W) with one grid at the probability `probability`; otherwise return them unchanged."""
    if rng.random() >= probability:
        return images
    H, W = images.shape[-2:]
    period = int(rng.integers(2, H))
    kept = min(max(int(period * 0.5 + 0.5), 1), period - 1)
    rows = _stripes(H, period, kept, int(rng.integers(period)))
    columns = _stripes(W, period, kept, int(rng.integers(period)))
    keep = torch.from_numpy(rows[:, None] | columns[None, :]).to(images.device)
    return images * keep.to(images.dtype)


def _stripes(size: int, period: int, kept: int, offset: int) -> np.ndarray:
    """Return (size,) bool, true for `kept` of every `period` positions; cut from the middle of a canvas of 1.5 times the size."""
    start = (int(1.5 * size) - size) // 2
    position = np.arange(start, start + size) - offset
    return (position >= 0) & (position % period < kept)
