"""Quantizes a float teacher: `python -m train.qat --teacher runs/demo/teacher.pt --bits w4a6 --student runs/demo/w4a6.pt`.

Batch norm is folded, quantizers are inserted as the policy says and calibrated, and the student is trained with fake quantization. With
`--start` the training continues from an existing student, for example when several forms of distillation share all stages but the last.
Source: QD-BEV (arXiv:2308.10515), sections 3 and 5.
"""

import argparse
import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from qdbev import artifact
from qdbev.artifact import ArtifactError, Seal
from qdbev.command import add_device, add_settings, entry_point, parse_device
from qdbev.config import Config, from_dict
from qdbev.detector import Detector
from qdbev.frames import open_frames
from qdbev.quant.config import QuantConfig
from qdbev.quant.pack import pack, paper_bytes, round_floats_to_half
from qdbev.quant.prepare import describe, table
from qdbev.recipes import student_config
from qdbev.restore import restore
from train.calibration import calibrated_student
from train.cpu_kernels import use_cpu_kernels
from train.distributed import World, process_group
from train.sensitivity import read_widths
from train.stages import StudentRun, run_stages


class Teacher(NamedTuple):
    """An opened teacher checkpoint: its path, its seal, and its float model on the CPU."""

    path: Path
    seal: Seal
    model: Detector


def train(
    teacher: Teacher,
    student_path: Path,
    config: Config,
    device: torch.device,
    world: World,
    resume: bool,
    start: Path | None = None,
    keep_every: float | None = None,
) -> None:
    """Calibrate a student of `teacher`, train it through the stages of `config.quant`, and write it to `student_path`.

    Args:
        resume: Continue in the last stage that saved a state.
        start: Student to train instead of calibrating a new one.
        keep_every: Epochs between students that are kept during training; None keeps none.

    Raises:
        ArtifactError: `start` is missing or damaged, or has another teacher or another policy.
    """
    torch.manual_seed(config.seed)
    frames = open_frames(config, config.data.train_split, training=True)
    if start is None:
        student, steps = calibrated_student(copy.deepcopy(teacher.model), config, frames, device), 0
    else:
        student, steps = _started(start, teacher, config.quant)
    if world.is_main:
        sys.stdout.write(table(describe(student)) + "\n")
    student_run = StudentRun(path=student_path, teacher=teacher.seal, resume=resume, first_step=steps, keep_every=keep_every)
    facts = run_stages(student, teacher.model.to(device), frames, config, student_run, device, world)
    round_floats_to_half(student)
    if world.is_main:
        sizes = {"paper_bytes": paper_bytes(student, config.quant.bits.weight), "packed_bytes": len(pack(student))}
        facts = dataclasses.replace(facts, image_hw=frames.transform.padded_hw, **sizes)
        student_run.save(student.cpu(), config, facts)


def _started(path: Path, teacher: Teacher, policy: QuantConfig) -> tuple[Detector, int]:
    """Open the student in `path`; returns it and the number of steps that it was trained for."""
    seal, student = restore(path, "student")
    artifact.expect_parent(path, seal, teacher.path, teacher.seal)
    own, wanted = dataclasses.asdict(from_dict(seal.config).quant), dataclasses.asdict(policy)
    differs = [name for name in wanted if own[name] != wanted[name] and name not in ("stages", "distill")]
    if differs:
        raise ArtifactError(f"{path} has another policy (differs in quant.{', quant.'.join(differs)}); calibrate anew, without --start")
    return student, seal.facts.steps or 0


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Quantize a float teacher: calibrate a student, and train it with fake quantization."""
    parser = argparse.ArgumentParser(prog="python -m train.qat", description=main.__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True, help="checkpoint to write; states and logs are written to its folder")
    parser.add_argument("--bits", required=True, help="widths of weights and activations, as w4a6; --set quant.* changes single groups")
    parser.add_argument("--widths", type=Path, help="widths of single layers, chosen by `python -m train.sensitivity`")
    parser.add_argument("--start", type=Path, help="student of the same teacher and policy to train, instead of calibrating a new one")
    parser.add_argument("--keep-every", type=float, metavar="EPOCHS", help="keep students at this interval and at both ends of a stage")
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state")
    add_settings(parser)
    add_device(parser)
    args = parser.parse_args(argv)
    if args.keep_every is not None and not 0 < args.keep_every < math.inf:
        raise ValueError(f"--keep-every {args.keep_every} must be a positive number of epochs")
    artifact.require_target(args.student, args.teacher, args.start)
    teacher = Teacher(args.teacher, *restore(args.teacher, "teacher"))
    config = student_config(from_dict(teacher.seal.config), args.bits, args.settings)
    if args.widths:
        config = dataclasses.replace(config, quant=dataclasses.replace(config.quant, layer_bits=read_widths(args.widths)))
    device = parse_device(args.device)
    use_cpu_kernels(device)
    with process_group(device) as world:
        train(teacher, args.student, config, device, world, args.resume, args.start, args.keep_every)


if __name__ == "__main__":
    main()
