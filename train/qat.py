"""Float teacher in, quantized student out: `python -m train.qat --teacher runs/demo/teacher.pt --bits w4a6 --student runs/demo/w4a6.pt`.

Batch norm is folded, quantizers are put in by policy and calibrated on frames run as in deployment, and the student is trained on with
fake quantization. `--start` goes on from a student instead, as when several ways of distilling share the stages before.
Source: QD-BEV (arXiv:2308.10515), sections 3 and 5.
"""

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

import torch

from qdbev import artifact
from qdbev.artifact import ArtifactError, Seal
from qdbev.command import add_device, add_settings, device, entry_point
from qdbev.config import Config, from_dict, override
from qdbev.detector import Detector
from qdbev.facts import StudentFacts
from qdbev.frames import open_frames
from qdbev.quant.config import QuantConfig
from qdbev.quant.pack import round_floats_to_half
from qdbev.quant.prepare import describe, table
from qdbev.quant.size import packed_bytes, paper_bytes
from qdbev.recipes import at_bits
from qdbev.restore import restore
from train.calibration import calibrated_student
from train.distributed import World, world
from train.sensitivity import read_widths
from train.stages import StudentRun, run_stages


def train(
    teacher_path: Path,
    student_path: Path,
    config: Config,
    device: torch.device,
    world: World,
    resume: bool,
    start: Path | None = None,
    keep_every: float | None = None,
) -> None:
    """Calibrate, or take the student `start`, train through the stages and seal the student of one policy.

    Raises:
        ArtifactError: A file is missing or damaged, or `start` has another teacher or another policy.
    """
    teacher_seal, teacher = restore(teacher_path)
    torch.manual_seed(config.seed)
    frames = open_frames(config, config.data.train_split, training=True)
    if start is None:
        student, steps = calibrated_student(copy.deepcopy(teacher), config, frames, device), 0
    else:
        student, steps = _started(start, teacher_path, teacher_seal, config.quant)
    if world.is_main:
        sys.stdout.write(table(describe(student)) + "\n")
    student_run = StudentRun(path=student_path, teacher=teacher_seal, resume=resume, first_step=steps, keep_every=keep_every)
    facts = StudentFacts()
    if config.quant.stages:
        facts = run_stages(student, teacher.to(device), frames, config, student_run, device, world)
    round_floats_to_half(student)
    if world.is_main:
        sizes = {"paper_bytes": paper_bytes(student, config.quant.bits.weight), "packed_bytes": packed_bytes(student)}
        facts = dataclasses.replace(facts, image_hw=frames.padded_hw, **sizes)
        student_run.save(student.cpu(), config, facts)


def _started(path: Path, teacher_path: Path, teacher: Seal, policy: QuantConfig) -> tuple[Detector, int]:
    """The student of `path` and the steps it has behind it."""
    seal, student = restore(path)
    if seal.kind != "student":
        raise ArtifactError(f"{path} is a {seal.kind} file; --start takes a student")
    artifact.expect_parent(path, seal, teacher_path, teacher)
    own, wanted = dataclasses.asdict(from_dict(seal.config).quant), dataclasses.asdict(policy)
    differs = [name for name in wanted if own[name] != wanted[name] and name not in ("stages", "distill")]
    if differs:
        raise ArtifactError(f"{path} has another policy (differs in quant.{', quant.'.join(differs)}); calibrate anew, without --start")
    return student, seal.facts.steps or 0


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Quantize a float teacher: calibrate, and train on with fake quantization."""
    parser = argparse.ArgumentParser(prog="python -m train.qat", description=main.__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True, help="checkpoint to write; its folder holds state and log")
    parser.add_argument("--bits", required=True, help="widths of weights and activations, as w4a6; --set quant.* changes single groups")
    parser.add_argument("--widths", type=Path, help="widths of single layers, chosen by `python -m train.sensitivity`")
    parser.add_argument("--start", type=Path, help="student of the same teacher and policy to train on, instead of calibrating")
    parser.add_argument("--keep-every", type=float, metavar="EPOCHS", help="keep students so often on the way and at both ends of a stage")
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state")
    add_settings(parser)
    add_device(parser)
    args = parser.parse_args(argv)
    seal, _, _ = artifact.load_checkpoint(args.teacher, "teacher")
    config = override(at_bits(from_dict(seal.config), args.bits), args.settings)
    if args.widths:
        config = dataclasses.replace(config, quant=dataclasses.replace(config.quant, layer_bits=read_widths(args.widths)))
    target = device(args.device)
    with world(target) as processes:
        train(args.teacher, args.student, config, target, processes, args.resume, args.start, args.keep_every)


if __name__ == "__main__":
    main()
