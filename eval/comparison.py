"""Compares the outputs of models on the same frames, tensor by tensor: each model with the one it was made from.

Both models of a pair get the inputs of the reference model, including its recurrent inputs, so differences do not accumulate over frames.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from eval.open_model import OpenModel
from qdbev.detector import run_stream
from qdbev.schema import Frame, Interface

TOLERANCE = 0.999
"""Cosine similarity below which two tensors count as different."""
DISTANCE = math.sqrt(2 * (1 - TOLERANCE))
"""Largest relative distance, |found - wanted| / |wanted|, at which two tensors count as the same: that of two tensors of equal length with
the cosine `TOLERANCE`. It also detects a wrong scale, which the cosine does not."""


class ComparisonError(ValueError):
    """Models whose outputs differ, or that cannot be compared."""


class TensorDifference(NamedTuple):
    """The difference between one output of `model` and the same output of `reference`, in one frame.

    Attributes:
        cosine: Cosine similarity of the flattened tensors.
        distance: |found - wanted| / |wanted|.
        max_abs: Largest absolute difference.
        allowed: Largest distance at which the tensors count as the same; the lowest cosine follows from it.
    """

    model: str
    reference: str
    frame: int
    token: str
    tensor: str
    cosine: float
    distance: float
    max_abs: float
    allowed: float

    @property
    def passed(self) -> bool:
        """True if the tensors count as the same."""
        return self.cosine >= self.least_cosine and self.distance <= self.allowed

    @property
    def least_cosine(self) -> float:
        """Lowest cosine at which the tensors count as the same: that of two tensors of equal length at the allowed distance."""
        return 1 - self.allowed**2 / 2


def compare(models: Sequence[tuple[str, OpenModel]], frames: Iterable[Frame], allowed: float = DISTANCE) -> Iterator[TensorDifference]:
    """Compare each model with the one before it, on that model's inputs, and yield the differences of all frames.

    `frames` are in order of time and are iterated once for each pair. `allowed` is the largest distance at which tensors count as the same.

    Raises:
        ComparisonError: An output is NaN or infinite.
    """
    for (reference, source), (name, other) in pairwise(models):
        for index, step in enumerate(run_stream(source.stream, source.run, frames)):
            found = other.run(step.inputs)
            for tensor in _in_order(source.config.model.interface(step.inputs["images"].shape[-2:])):
                wanted = step.outputs[tensor]
                _require_finite({reference: wanted, name: found[tensor]}, tensor, index)
                yield TensorDifference(name, reference, index, step.frame.token, tensor, *figures(wanted, found[tensor]), allowed)


def figures(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float, float]:
    """Cosine, relative distance and largest absolute difference. An array of zeros agrees only with another array of zeros."""
    a, b = wanted.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    apart, largest = float(np.linalg.norm(a - b)), float(np.abs(a - b).max())
    if 0.0 in lengths:
        return (1.0, 0.0, 0.0) if lengths == (0.0, 0.0) else (0.0, 1.0, largest)
    return float(a @ b) / (lengths[0] * lengths[1]), apart / lengths[0], largest


def require_same(rows: Iterable[TensorDifference]) -> None:
    """Raise ComparisonError, which names the first tensor out of tolerance, if there is one."""
    for row in rows:
        if not row.passed:
            raise ComparisonError(
                f"{row.model} does not compute what {row.reference} computes: first in {row.tensor} of frame {row.frame} ({row.token}), "
                f"cosine {row.cosine:.6f} (at least {row.least_cosine:.6g}), distance {row.distance:.4g} (at most {row.allowed:.4g}), "
                f"max abs {row.max_abs:.2e}"
            )


def _in_order(interface: Interface) -> list[str]:
    """Names of the outputs, the recurrent ones first: the network decodes the other outputs from them."""
    recurrent = [output for output, _ in interface.recurrent]
    return recurrent + [name for name in interface.outputs if name not in recurrent]


def _require_finite(outputs: dict[str, np.ndarray], tensor: str, frame: int) -> None:
    for model, value in outputs.items():
        wrong = int(value.size - np.isfinite(value).sum())
        if wrong:
            raise ComparisonError(f"{model}: {wrong} of {value.size} values of {tensor} in frame {frame} are NaN or infinite")
