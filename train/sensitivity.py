"""Measures how much the quantization of each layer increases the loss, and allocates bit widths to layers within a budget.

    python -m train.sensitivity --teacher runs/demo/teacher.pt --bits w3a3 --budget size --out runs/demo/widths.json
    python -m train.qat --teacher runs/demo/teacher.pt --student runs/demo/mixed.pt --bits w3a3 --widths runs/demo/widths.json

Every weight and every activation is quantized alone at every width, on frames that run as in deployment. Two measures are recorded: the
signal-to-noise ratio of the BEV features, and the distance of the detections from the float model's in units of the detection loss
(distill.head_divergence), which the allocation minimises. Only the widths of weights are chosen; activations keep those of the policy.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from qdbev import artifact
from qdbev.artifact import Seal
from qdbev.command import add_device, add_settings, entry_point, parse_device
from qdbev.config import Config, from_dict
from qdbev.data.collate import queue_batch
from qdbev.data.dataset import FrameDataset
from qdbev.detector import Detector, Output
from qdbev.frames import open_frames
from qdbev.quant.bops import costs
from qdbev.quant.config import Bits, LayerBits
from qdbev.quant.layers import WeightLayer, activation_quantizers, quant_layers, weight_of
from qdbev.quant.prepare import bits_of
from qdbev.quant.quantizer import Quantizer
from qdbev.recipes import student_config
from qdbev.restore import restore
from qdbev.schema import Batch
from qdbev.settings import build
from train.bit_allocation import Option, allocate_bits
from train.calibration import calibrated_student
from train.cpu_kernels import use_cpu_kernels
from train.distill import head_divergence
from train.loop import to_device
from train.stage_loss import history_state

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bit widths that are measured."""
NUM_QUEUES = 8
"""Number of queues of frames, spread over the training split, on which everything is measured."""

_RENAMED = {"harm": "loss_increase"}
"""Fields of `Sensitivity` that files of earlier versions call otherwise, from the old name to the new one."""


class Sensitivity(NamedTuple):
    """Effect of quantizing one part of one layer, "weight" or "activation", alone and at one bit width.

    bev_snr: Signal-to-noise ratio of the BEV features in decibels.
    loss_increase: Distance of the detections from those of the float model, in units of the detection loss.
    """

    layer: str
    part: str
    bits: int
    bev_snr: float
    loss_increase: float


@torch.no_grad()
def measure(teacher: Detector, config: Config, frames: FrameDataset, device: torch.device) -> list[Sensitivity]:
    """Measure each layer's weight and activation alone, at each of `WIDTHS`, for all layers that the policy quantizes."""
    queue = _queues(frames, device)
    taught = _forward(teacher.to(device).eval(), *queue)
    rows = []
    for width in tqdm(WIDTHS, desc="widths", unit="width", disable=None):
        student = calibrated_student(copy.deepcopy(teacher), _uniform(config, width), frames, device)
        parts = list(_parts(student))
        for _, _, group in parts:
            for quantizer in group:
                quantizer.disable_quant()
        for name, part, group in tqdm(parts, desc=f"{width} bits", unit="quantizer", leave=False, disable=None):
            for quantizer in group:
                quantizer.enable_quant()
            output = _forward(student, *queue)
            snr, loss_increase = _snr(_features(output), _features(taught)), float(head_divergence(output, taught, config.train))
            rows.append(Sensitivity(name, part, width, snr, loss_increase))
            for quantizer in group:
                quantizer.disable_quant()
    return rows


def choose(
    rows: list[Sensitivity], teacher: Detector, config: Config, frames: FrameDataset, budget: str, device: torch.device
) -> dict[str, int]:
    """Choose the bits of each layer's weight, by layer name, so that together they cost no more than those of the policy in `config`.

    Args:
        budget: Unit of the cost: bytes of the weights (`size`) or bit operations of one frame (`bops`).
    """
    student = calibrated_student(copy.deepcopy(teacher), config, frames, device)
    weights = {name: layer for name, layer in quant_layers(student) if isinstance(layer, WeightLayer)}
    unit = {name: float(weight_of(layer).numel()) / 8 for name, layer in weights.items()}
    if budget == "bops":
        _, current = _queues(frames, device)
        unit = dict.fromkeys(weights, 0.0)
        for cost in costs(student, lambda: _forward(student, [], current)):
            if cost.name in unit:
                unit[cost.name] += float(cost.macs * cost.activation_bits)
    options = {
        name: [Option(row.bits, unit[name] * row.bits, row.loss_increase) for row in rows if (row.layer, row.part) == (name, "weight")]
        for name in weights
    }
    return allocate_bits(options, sum(unit[name] * layer.weight_quantizer.num_bits for name, layer in weights.items()))


def layer_bits(chosen: dict[str, int], config: Config) -> tuple[LayerBits, ...]:
    """Return the chosen bits of weights, by layer name, as a policy; the bits of activations are those of `config` without layer_bits."""
    plain = dataclasses.replace(config.quant, layer_bits=())
    return tuple(LayerBits(layers=name, bits=dataclasses.replace(bits_of(name, plain), weight=bits)) for name, bits in chosen.items())


def read_widths(path: Path) -> tuple[LayerBits, ...]:
    """Read the policy from a file that this command wrote. Raises ValueError if the file is missing or is no such file."""
    with _refused_as_no_file_of_widths(path):
        found = json.loads(path.read_text())["layer_bits"]
        return tuple(build(LayerBits, entry) for entry in found)


def read_rows(path: Path, teacher: Seal) -> list[Sensitivity]:
    """Read the measurements from a file that this command wrote for the same teacher; they do not depend on policy or budget.

    Raises:
        ValueError: The file is missing, is no such file, or was measured with another teacher.
    """
    with _refused_as_no_file_of_widths(path):
        content = json.loads(path.read_text())
        rows = [Sensitivity(**{_RENAMED.get(name, name): value for name, value in row.items()}) for row in content["rows"]]
    if content.get("teacher") != teacher.sha256:
        raise ValueError(f"{path} was measured with another teacher than {teacher.sha256[:12]}; measure anew, without --measured")
    return rows


@contextlib.contextmanager
def _refused_as_no_file_of_widths(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file of widths ({error!r}); `python -m train.sensitivity` writes one") from error


def _uniform(config: Config, width: int) -> Config:
    """Return a config whose policy quantizes the same layers as `config`, all of them at one bit width."""
    bits = Bits(weight=width, activation=width)
    embedding_bits = None if config.quant.embedding_bits is None else width
    policy = dataclasses.replace(config.quant, bits=bits, group_bits=(), edge=bits, layer_bits=(), embedding_bits=embedding_bits)
    return dataclasses.replace(config, quant=policy)


def _parts(student: Detector) -> Iterator[tuple[str, str, list[Quantizer]]]:
    """Yield layer name, part ("weight" or "activation") and the quantizers that are measured together."""
    for name, layer in quant_layers(student):
        if isinstance(layer, WeightLayer):
            yield name, "weight", [layer.weight_quantizer]
        if inputs := activation_quantizers(layer):
            yield name, "activation", inputs


def _queues(frames: FrameDataset, device: torch.device) -> tuple[list[Batch], Batch]:
    """Return history and current frames of the queues on which everything is measured, as one batch."""
    indices = np.linspace(0, len(frames) - 1, NUM_QUEUES).astype(int)
    history, current = queue_batch([frames.queue(int(index), 0) for index in indices])
    return [to_device(batch, device) for batch in history], to_device(current, device)


def _forward(model: Detector, history: list[Batch], current: Batch) -> Output:
    return model(current, history_state(model, history))[0]


def _features(output: Output) -> torch.Tensor:
    """Return the BEV features, or the last level of image features of a detector without a BEV."""
    return output.image_features[-1] if output.bev is None else output.bev


def _snr(noisy: torch.Tensor, clean: torch.Tensor) -> float:
    """Return the signal-to-noise ratio in decibels, at most 150, which is the precision of float32."""
    noise = (noisy - clean).double().square().sum().clamp_min(1e-15 * clean.double().square().sum())
    return float(10 * torch.log10(clean.double().square().sum() / noise))


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Measure the sensitivity of every layer and choose bit widths within a budget."""
    parser = argparse.ArgumentParser(prog="python -m train.sensitivity", description=main.__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--bits", required=True, help="uniform policy whose cost is the budget, as w4a6")
    parser.add_argument("--budget", required=True, choices=("size", "bops"))
    parser.add_argument("--measured", type=Path, help="earlier result for the same teacher: choose again from its measurements")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, with measurements and choice")
    add_settings(parser)
    add_device(parser)
    args = parser.parse_args(argv)
    artifact.require_target(args.out, args.teacher, args.measured)
    seal, teacher = restore(args.teacher, "teacher")
    config = student_config(from_dict(seal.config), args.bits, args.settings)
    device = parse_device(args.device)
    use_cpu_kernels(device)
    frames = open_frames(config, config.data.train_split)
    rows = read_rows(args.measured, seal) if args.measured else measure(teacher, config, frames, device)
    chosen = choose(rows, teacher, config, frames, args.budget, device)
    content = {
        "budget": args.budget,
        "recipe": config.name,
        "teacher": seal.sha256,
        "layer_bits": [dataclasses.asdict(entry) for entry in layer_bits(chosen, config)],
        "chosen": chosen,
        "rows": [row._asdict() for row in rows],
        "made": artifact.provenance(),
    }
    with artifact.atomic(args.out) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    for name, bits in chosen.items():
        increase = next(row.loss_increase for row in rows if (row.layer, row.part, row.bits) == (name, "weight", bits))
        sys.stdout.write(f"{name:<56}{bits:>2} bits, loss increase {increase:.4f}\n")
    sys.stdout.write(f"{args.out}\n")


if __name__ == "__main__":
    main()
