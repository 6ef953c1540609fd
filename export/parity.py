"""PyTorch against onnxruntime on two consecutive frames, each side carrying its own BEV from the first to the second.

What counts as equal:

float       every output within `FLOAT_TOLERANCE` everywhere. Both sides compute the same sums in another order.
quantized   1 - cosine of every output at most `QUANTIZED_TOLERANCE`, or `SELF_FACTOR` times what PyTorch differs from itself when the
            images are changed by one part in a million, whichever is more, but never above `WORST_TOLERANCE`.

Why: two orders of summation differ by about 1e-7, and where that straddles a rounding boundary a value moves by a whole step, which
later layers carry on. How far that goes depends on the network and its bits, so PyTorch's distance from itself is the yardstick: it
comes from the same cause, and comes out at the same size. The largest difference is a matter of luck and only reported. A wrong scale,
weight or clip moves every value of a layer, which the cosine shows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from export.runner import OnnxRunner
from qdbev import schema, temporal
from qdbev.data.synthetic import rig
from qdbev.geometry import inverse, rigid
from qdbev.model.bevformer import BEVFormer, Deployed
from qdbev.schema import CAMERAS, Frame

FLOAT_TOLERANCE = 1e-3
QUANTIZED_TOLERANCE = 1e-3
WORST_TOLERANCE = 1e-2
SELF_FACTOR = 4.0
_CHANGE = 1e-6

Side = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
"""One implementation of the deployed graph."""

_CAN_BUS_SIZE = 18
_STEP = np.array((2.5, 0.1, 0.0))
"""Metres between the two synthetic frames: half a second at 5 m/s."""
_TURN = np.deg2rad(2.0)


class Row(NamedTuple):
    """One output of one frame: how far ONNX is from PyTorch, how far PyTorch is from itself (quantized only), and the verdict."""

    frame: int
    output: str
    max_abs: float
    cosine: float
    self_cosine: float
    passed: bool


def measure(model: BEVFormer, runner: OnnxRunner, frames: Sequence[Frame], quantized: bool) -> list[Row]:
    """Run both sides over consecutive frames of one scene and compare every output."""
    deployed = Deployed(model).eval()

    def torch_side(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = deployed(*(torch.from_numpy(inputs[name]) for name in schema.INPUTS))
        return {name: output.numpy() for name, output in zip(schema.OUTPUTS, outputs, strict=True)}

    ours = _chain(torch_side, frames, model)
    itself = _chain(torch_side, _changed(frames), model) if quantized else ours
    theirs = _chain(runner, frames, model)  # last: onnxruntime keeps what memory it took
    return [
        _compare(index, name, ours[index][name], theirs[index][name], itself[index][name], quantized)
        for index in range(len(frames))
        for name in schema.OUTPUTS
    ]


def synthetic_frames(model: BEVFormer, image_hw: tuple[int, int], pixel_std: float = 1.0) -> tuple[Frame, Frame]:
    """Two frames of noise, seen by a nuScenes-like rig that drives and turns; the same ones at every call.

    Args:
        pixel_std: Standard deviation of the normalised pixels, so that they fill the ranges that calibration found.
    """
    rng = np.random.default_rng(0)
    lidar2img = np.stack([_img_from_lidar(camera, image_hw[1]) for camera in range(model.config.num_cameras)]).astype(np.float32)
    frames = (_noise_frame(rng, index, lidar2img, image_hw) for index in (0, 1))
    first, second = (dataclasses.replace(frame, images=frame.images * np.float32(pixel_std)) for frame in frames)
    return first, second


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [f"{'frame':<7}{'output':<12}{'max abs':>10}{'cosine':>13}{'torch itself':>14}"]
    for row in rows:
        verdict = "" if row.passed else "  out of tolerance"
        lines.append(f"{row.frame:<7}{row.output:<12}{row.max_abs:>10.2e}{row.cosine:>13.8f}{row.self_cosine:>14.8f}{verdict}")
    return "\n".join(lines)


def facts(rows: Sequence[Row]) -> dict[str, float]:
    """Worst figures of each output, for the seal."""
    worst = {}
    for name in schema.OUTPUTS:
        worst[f"parity_{name}_max_abs"] = max(row.max_abs for row in rows if row.output == name)
        worst[f"parity_{name}_cosine"] = min(row.cosine for row in rows if row.output == name)
    return worst


def _chain(side: Side, frames: Sequence[Frame], model: BEVFormer) -> list[dict[str, np.ndarray]]:
    """Outputs of each frame, the BEV of one going into the next."""
    memory, results = None, []
    for frame in frames:
        results.append(side(temporal.deployed_inputs(frame, memory, model.config)))
        memory = temporal.remember(frame, results[-1]["bev"])
    return results


def _changed(frames: Sequence[Frame]) -> list[Frame]:
    rng = np.random.default_rng(1)
    return [dataclasses.replace(frame, images=_nudged(frame.images, rng)) for frame in frames]


def _nudged(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (values * (1 + _CHANGE * rng.standard_normal(values.shape))).astype(np.float32)


def _compare(frame: int, name: str, ours: np.ndarray, theirs: np.ndarray, itself: np.ndarray, quantized: bool) -> Row:
    max_abs = float(np.abs(ours - theirs).max())
    cosine, self_cosine = _cosine(ours, theirs), _cosine(ours, itself)
    tolerance = min(max(QUANTIZED_TOLERANCE, SELF_FACTOR * (1 - self_cosine)), WORST_TOLERANCE)
    passed = 1 - cosine <= tolerance if quantized else max_abs <= FLOAT_TOLERANCE
    return Row(frame, name, max_abs, cosine, self_cosine, passed)


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of the flattened arrays; two zero arrays agree, and NaN agrees with nothing."""
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    if not a.any() and not b.any():
        return 1.0
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _img_from_lidar(camera: int, image_width: int) -> np.ndarray:
    """(4, 4) of a camera of the synthetic rig; more cameras than it has repeat it."""
    sensor = rig.make_sensor(CAMERAS[camera % len(CAMERAS)], image_width)
    lidar = rig.make_sensor(rig.LIDAR, image_width)
    cam_from_lidar = inverse(rigid(sensor.ego_from_sensor, sensor.translation)) @ rigid(lidar.ego_from_sensor, lidar.translation)
    return rigid(sensor.intrinsic, np.zeros(3)) @ cam_from_lidar


def _noise_frame(rng: np.random.Generator, index: int, lidar2img: np.ndarray, image_hw: tuple[int, int]) -> Frame:
    can_bus = np.zeros(_CAN_BUS_SIZE)
    can_bus[temporal.POSITION] = index * _STEP
    can_bus[temporal.YAW_RAD] = index * _TURN
    can_bus[temporal.YAW_DEG] = np.rad2deg(index * _TURN)
    return Frame(
        token=f"synthetic_{index}",
        scene_token="synthetic",
        timestamp_us=index * 500_000,
        images=rng.standard_normal((len(lidar2img), 3, *image_hw), dtype=np.float32),
        lidar2img=lidar2img,
        can_bus=can_bus,
        boxes=np.zeros((0, 9), np.float32),
        labels=np.zeros(0, np.int64),
    )
