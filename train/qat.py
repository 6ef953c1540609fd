"""Float teacher in, quantized student out: `python -m train.qat --teacher runs/demo/teacher.pt --bits w4a6 --student runs/demo/w4a6.pt`.

Batch norm is folded, quantizers are put in by policy and calibrated on frames run as in deployment, and the student is trained on with
fake quantization. Source: QD-BEV (arXiv:2308.10515), sections 3 and 5.
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch

from qdbev import artifact, temporal
from qdbev.command import add_device, add_settings, device, entry_point
from qdbev.config import Config, from_dict, override, to_dict
from qdbev.data.collate import frame_batch
from qdbev.data.dataset import FrameDataset
from qdbev.model.bevformer import BEVFormer
from qdbev.quant.calibrate import calibrate
from qdbev.quant.pack import settle
from qdbev.quant.prepare import describe, table
from qdbev.quant.size import packed_bytes, paper_bytes
from qdbev.recipes import BITS
from qdbev.restore import quantized, restore
from train.distributed import World, world
from train.stages import run_stages


def calibrated_student(teacher: BEVFormer, config: Config, frames: FrameDataset, device: torch.device) -> BEVFormer:
    """The teacher (altered in place) with calibrated quantizers."""
    student = quantized(config, teacher).to(device)
    calibrate(student, lambda: stream(student, frames, config.quant.calibration_samples, device), config.quant.calibration)
    return student


@torch.no_grad()
def stream(model: BEVFormer, frames: FrameDataset, num_frames: int, device: torch.device) -> None:
    """Run pairs of successive frames, spread evenly over the dataset, the second of each with the first one's BEV."""
    for index in np.linspace(1, len(frames) - 1, max(num_frames // 2, 1)).astype(int):
        memory = None
        for frame in (frames.frame(index - 1), frames.frame(index)):
            can_bus, bev = temporal.observe(frame, memory)
            batch = frame_batch([frame], [can_bus], [bev is not None])
            prev_bev = None if bev is None else torch.from_numpy(bev).to(device)
            output = model(batch.images.to(device), batch.lidar2img.to(device), batch.can_bus.to(device), prev_bev)
            memory = temporal.remember(frame, output.bev.cpu().numpy())


def train(teacher_path: Path, student_path: Path, config: Config, device: torch.device, world: World, resume: bool) -> None:
    """Calibrate, train through the stages and seal the student of one policy."""
    teacher_seal, teacher = restore(teacher_path)
    torch.manual_seed(config.seed)
    frames = FrameDataset(config.data, config.model.pc_range, config.data.train_split, training=True, seed=config.seed)
    student = calibrated_student(copy.deepcopy(teacher), config, frames, device)
    if world.is_main:
        sys.stdout.write(table(describe(student)) + "\n")
    facts = {"image_hw": list(frames.padded_hw)}
    if config.quant.stages:
        facts |= run_stages(student, teacher.to(device), frames, config, student_path.parent, student_path.stem, device, world, resume)
    settle(student)
    if world.is_main:
        facts |= {"paper_bytes": paper_bytes(student, config.quant.encoder.weight), "packed_bytes": packed_bytes(student)}
        artifact.save_checkpoint(
            student_path, kind="student", config=to_dict(config), weights=student.cpu().state_dict(), parent=teacher_seal, facts=facts
        )


@entry_point
def main() -> None:
    """Quantize a float teacher: calibrate, and train on with fake quantization."""
    parser = argparse.ArgumentParser(prog="python -m train.qat", description=main.__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True, help="checkpoint to write; its folder holds state and log")
    parser.add_argument("--bits", required=True, choices=BITS, help="weight and activation widths; --set quant.* changes single groups")
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state")
    add_settings(parser)
    add_device(parser)
    args = parser.parse_args()
    seal, _, _ = artifact.load_checkpoint(args.teacher, "teacher")
    config = override(BITS[args.bits](from_dict(seal.config)), args.settings)
    target = device(args.device)
    with world(target) as processes:
        train(args.teacher, args.student, config, target, processes, args.resume)


if __name__ == "__main__":
    main()
