"""The stages of quantization-aware training: what is quantized grows, and at the end the student learns from its float teacher.

Source: QD-BEV (arXiv:2308.10515), Algorithm 1. A stage starts from the weights of the one before it, with an optimizer of its own.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from qdbev.config import Config, Stage, TrainConfig
from qdbev.data.dataset import FrameDataset
from qdbev.model.bevformer import BEVFormer
from qdbev.quant.prepare import enable
from train.distributed import World
from train.guide import Guide
from train.loop import Run, fit, total_steps


def run_stages(
    student: BEVFormer,
    teacher: BEVFormer,
    frames: FrameDataset,
    config: Config,
    folder: Path,
    name: str,
    device: torch.device,
    world: World,
    resume: bool,
) -> dict[str, Any]:
    """Train `student` in place through `config.quant.stages`; facts about them.

    Args:
        teacher: The float model, on `device`; read by stages that distill.
        folder: Where state and log of each stage are kept, as `<name>.stage<k>`.
        resume: Continue in the last stage that left a state, or at the beginning where none did.

    Raises:
        ArtifactError: The state to resume from belongs to another run.
        DivergenceError: A loss or a gradient is no longer finite.
    """
    runs = _runs(config, len(frames), teacher, folder, name, device, world)
    done = [index for index, run in enumerate(runs) if run.state_path.is_file()]
    begin = max(done, default=0) if resume else 0
    if not resume and world.is_main:
        for run in runs:
            run.state_path.unlink(missing_ok=True)
    facts: list[dict[str, Any]] = []
    for stage, run in list(zip(config.quant.stages, runs, strict=True))[begin:]:
        enable(student.requires_grad_(True), stage.groups)  # in this order: a quantizer that is off has nothing to learn
        facts.append(fit(student, frames, dataclasses.replace(run, resume=resume and run.state_path.is_file())))
    return {"steps": runs[-1].first_step + facts[-1]["steps"], "final_loss": facts[-1]["final_loss"]}


def schedule_of(stage: Stage, train: TrainConfig) -> TrainConfig:
    """The float training's schedule with a stage's length and rate, without warm-up."""
    return dataclasses.replace(train, epochs=stage.epochs, learning_rate=stage.learning_rate, warmup_steps=0)


def _runs(config: Config, num_samples: int, teacher: BEVFormer, folder: Path, name: str, device: torch.device, world: World) -> list[Run]:
    runs, first_step = [], 0
    for index, stage in enumerate(config.quant.stages):
        schedule = schedule_of(stage, config.train)
        guide = Guide(teacher if stage.distill else None, config, world)
        runs.append(
            Run(
                config=config,
                schedule=schedule,
                folder=folder,
                name=f"{name}.stage{index + 1}",
                title=f"{name}, stage {index + 1} of {len(config.quant.stages)}",
                device=device,
                world=world,
                loss=guide,
                balance=guide.balance,
                first_step=first_step,
            )
        )
        first_step += total_steps(schedule, num_samples)
    return runs
