"""Measures the cost of fake quantization and of distillation: `python -m bench.step_cost --teacher runs/demo/teacher.pt --bits w4a6`.

A float step, a quantization-aware step and a distilling step take turns on every batch, so that their ratios are also right on a busy
machine.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from bench import report
from qdbev import artifact
from qdbev.command import add_device, add_settings, entry_point, parse_device
from qdbev.config import Config, from_dict
from qdbev.detector import Detector
from qdbev.frames import open_frames
from qdbev.recipes import student_config
from qdbev.restore import restore
from train.calibration import calibrated_student
from train.distributed import World
from train.loop import Learner, Run, batches, train_step
from train.stage_loss import StageLoss

STEPS, WARM_UP = 20, 3
"""Number of measured steps of each kind, and of steps before them that are not measured."""


def measure(teacher: Detector, config: Config, target: torch.device) -> dict[str, float]:
    """Measure each kind of step: median seconds, and the median ratio to the float step of the same batch."""
    frames = open_frames(config, config.data.train_split, training=True)
    student = calibrated_student(copy.deepcopy(teacher), config, frames, target)
    world = World()
    models = {"float": copy.deepcopy(teacher), "qat": copy.deepcopy(student), "distill": student}
    learners, runs = {}, {}
    for name, model in models.items():
        learners[name] = Learner(model.requires_grad_(True), config.train, target)
        loss = StageLoss(teacher.to(target) if name == "distill" else None, config, world)
        runs[name] = Run(config=config, schedule=config.train, folder=Path(), name=name, device=target, world=world, loss=loss)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for history, current in batches(frames, runs["float"], 0, WARM_UP + STEPS):
        for name, learner in learners.items():
            start = time.perf_counter()
            train_step(learner, history, current, runs[name], 0)
            if target.type == "cuda":
                torch.cuda.synchronize(target)
            seconds[name].append(time.perf_counter() - start)
    counted = {name: values[WARM_UP:] for name, values in seconds.items()}
    figures: dict[str, float] = {"steps": STEPS}
    for name in ("qat", "distill"):
        ratios = (own / plain for plain, own in zip(counted["float"], counted[name], strict=True))
        figures[f"{name}_ratio"] = statistics.median(ratios)
    return figures | {f"{name}_s": statistics.median(values) for name, values in counted.items()}


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compare the cost of a float training step with a quantization-aware and a distilling one."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_cost", description=main.__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--bits", required=True, help="bits of weights and activations, such as w4a6")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    add_settings(parser)
    add_device(parser)
    args = parser.parse_args(argv)
    artifact.require_target(args.out, args.teacher)
    seal, teacher = restore(args.teacher)
    config = student_config(from_dict(seal.config), args.bits, args.settings)
    target = parse_device(args.device)
    figures = measure(teacher, config, target)
    hardware = torch.cuda.get_device_name(target) if target.type == "cuda" else f"{os.cpu_count()} CPU cores"
    report.write(args.out, {**figures, "recipe": config.name, "bits": args.bits, "hardware": hardware})
    for name in ("qat", "distill"):
        line = f"{name} step {figures[f'{name}_s']:.3f} s, float step {figures['float_s']:.3f} s, ratio {figures[f'{name}_ratio']:.2f}"
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
