"""Compares an ONNX in onnxruntime with its model in PyTorch, on two consecutive frames, each side with its own memory.

These outputs count as equal:

float       Every value differs by at most `FLOAT_TOLERANCE`. Both sides compute the same sums in another order.
quantized   1 - cosine is at most `QUANTIZED_TOLERANCE`, or `SELF_FACTOR` times the difference of PyTorch from itself with images changed by
            one part in a million, whichever is larger, but at most `WORST_TOLERANCE`.
float16     The same, with images changed by the rounding of float16.

Two orders of summation differ by about 1e-7. At a rounding boundary this changes a value by a whole step, and the change spreads through
later layers. Its size depends on the network and its bits, so it is compared with PyTorch's difference from itself, which has the same
cause and the same size. The largest difference is random and only reported. A wrong scale, weight or clip changes every value of a layer,
which the cosine shows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from export.runner import OnnxRunner
from qdbev import detectors
from qdbev.detector import Arrays, Deployed, Detector, FrameStream, run_stream
from qdbev.schema import Frame

Run = Callable[[Arrays], Arrays]
"""A function that computes the deployed graph: outputs by name from inputs by name."""
FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 1e-3
WORST_TOLERANCE = 1e-2
SELF_FACTOR = 4.0
SUM_ORDER_CHANGE = 1e-6
"""Relative change of the images whose effect is like that of another order of summation."""
FLOAT16_CHANGE = 2.0**-11
"""Relative change of the images whose effect is like that of rounding to float16."""


class OutputParity(NamedTuple):
    """Difference of one output of one frame between ONNX and PyTorch, and of PyTorch from itself (quantized and float16 only)."""

    frame: int
    output: str
    max_abs: float
    cosine: float
    self_cosine: float
    passed: bool


@torch.no_grad()
def measure(model: Detector, runner: OnnxRunner, frames: Sequence[Frame], change: float | None = None) -> list[OutputParity]:
    """Run both sides over consecutive frames of one scene and compare every output.

    Args:
        change: SUM_ORDER_CHANGE for a quantized model, FLOAT16_CHANGE for float16, None for float32.
    """
    return compare(Deployed(model).eval().run, runner, frames, detectors.stream(model.config), change)


def compare(reference: Run, other: Run, frames: Sequence[Frame], stream: FrameStream, change: float | None = None) -> list[OutputParity]:
    """Run a function and its reference over consecutive frames of one scene and compare every output; `change` as in `measure`."""
    ours = _outputs(reference, frames, stream)
    itself = ours if change is None else _outputs(reference, _changed(frames, change), stream)
    theirs = _outputs(other, frames, stream)  # last, because onnxruntime does not return its memory
    return [
        _compare(index, name, ours[index][name], theirs[index][name], itself[index][name], change is not None)
        for index in range(len(frames))
        for name in ours[index]
    ]


def table(rows: Sequence[OutputParity]) -> str:
    """The rows as aligned text."""
    lines = [f"{'frame':<7}{'output':<12}{'max abs':>10}{'cosine':>13}{'torch itself':>14}"]
    for row in rows:
        verdict = "" if row.passed else "  out of tolerance"
        lines.append(f"{row.frame:<7}{row.output:<12}{row.max_abs:>10.2e}{row.cosine:>13.8f}{row.self_cosine:>14.8f}{verdict}")
    return "\n".join(lines)


def worst(rows: Sequence[OutputParity]) -> dict[str, float]:
    """Largest difference and smallest cosine of each output, as `<output>_max_abs` and `<output>_cosine`."""
    figures = {}
    for name in dict.fromkeys(row.output for row in rows):
        figures[f"{name}_max_abs"] = max(row.max_abs for row in rows if row.output == name)
        figures[f"{name}_cosine"] = min(row.cosine for row in rows if row.output == name)
    return figures


def _outputs(run: Run, frames: Sequence[Frame], stream: FrameStream) -> list[Arrays]:
    return [step.outputs for step in run_stream(stream, run, frames)]


def _changed(frames: Sequence[Frame], change: float) -> list[Frame]:
    rng, changed = np.random.default_rng(1), []
    for frame in frames:
        images = frame.images * (1 + change * rng.standard_normal(frame.images.shape))
        changed.append(dataclasses.replace(frame, images=images.astype(np.float32)))
    return changed


def _compare(frame: int, name: str, ours: np.ndarray, theirs: np.ndarray, itself: np.ndarray, quantized: bool) -> OutputParity:
    max_abs = float(np.abs(ours - theirs).max())
    cosine, self_cosine = _cosine(ours, theirs), _cosine(ours, itself)
    tolerance = min(max(QUANTIZED_TOLERANCE, SELF_FACTOR * (1 - self_cosine)), WORST_TOLERANCE)
    passed = 1 - cosine <= tolerance if quantized else max_abs <= FLOAT_TOLERANCE
    return OutputParity(frame, name, max_abs, cosine, self_cosine, passed)


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of two flattened arrays; 1 for two arrays of zeros, NaN if one contains NaN."""
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    if not a.any() and not b.any():
        return 1.0
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
