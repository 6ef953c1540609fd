"""What fake quantization costs: `python -m train.step_cost --teacher runs/demo/teacher.pt --bits w4a6`.

A float and a quantization-aware step take turns on every batch, so that the ratio holds on a busy machine.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from qdbev import artifact
from qdbev.command import add_device, add_settings, device, entry_point
from qdbev.config import Config, from_dict, override
from qdbev.data.dataset import FrameDataset
from qdbev.model.bevformer import BEVFormer
from qdbev.recipes import at_bits
from qdbev.restore import restore
from train.calibration import calibrated_student
from train.criterion import detection_loss
from train.distributed import World
from train.loop import Learner, Run, batches, train_step

WARM_UP = 3
"""First steps of each, which are not counted."""


def measure(teacher: BEVFormer, config: Config, target: torch.device, steps: int) -> dict[str, float]:
    """Median seconds of a float and of a quantization-aware step over `steps` batches, and the median of their ratios."""
    frames = FrameDataset(config.data, config.model.pc_range, config.data.train_split, training=True, seed=config.seed)
    student = calibrated_student(copy.deepcopy(teacher), config, frames, target).requires_grad_(True)
    run = Run(
        config=config,
        schedule=config.train,
        folder=Path(),
        name="step cost",
        device=target,
        world=World(),
        loss=lambda output, batch, _: detection_loss(output, batch.boxes, batch.labels, config.train),
    )
    seconds: dict[str, list[float]] = {"float": [], "qat": []}
    learners = {name: Learner.of(model, config.train, target) for name, model in (("float", teacher), ("qat", student))}
    for history, current in batches(frames, run, 0, WARM_UP + steps):
        for name, learner in learners.items():
            start = time.perf_counter()
            train_step(learner, history, current, run, 0)
            if target.type == "cuda":
                torch.cuda.synchronize(target)
            seconds[name].append(time.perf_counter() - start)
    counted = {name: values[WARM_UP:] for name, values in seconds.items()}
    ratios = [qat / plain for plain, qat in zip(counted["float"], counted["qat"], strict=True)]
    return {"steps": steps, "ratio": statistics.median(ratios)} | {
        f"{name}_s": statistics.median(values) for name, values in counted.items()
    }


@entry_point
def main() -> None:
    """Compare the cost of a float and of a quantization-aware training step."""
    parser = argparse.ArgumentParser(prog="python -m train.step_cost", description=main.__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--bits", required=True, help="widths of weights and activations, as w4a6")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    add_settings(parser)
    add_device(parser)
    args = parser.parse_args()
    seal, teacher = restore(args.teacher)
    config = override(at_bits(from_dict(seal.config), args.bits), args.settings)
    target = device(args.device)
    figures = measure(teacher, config, target, args.steps)
    hardware = torch.cuda.get_device_name(target) if target.type == "cuda" else f"{os.cpu_count()} CPU cores"
    figures |= {"recipe": config.name, "bits": args.bits, "hardware": hardware, "made": artifact.provenance()}
    if args.out:
        with artifact.atomic(args.out) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.write(f"QAT step {figures['qat_s']:.3f} s, float step {figures['float_s']:.3f} s, ratio {figures['ratio']:.2f}\n")


if __name__ == "__main__":
    main()
