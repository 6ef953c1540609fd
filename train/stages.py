"""The stages of quantization-aware training: what is quantized grows, and at the end the student learns from its float teacher.

Source: QD-BEV (arXiv:2308.10515), Algorithm 1. A stage starts from the weights of the one before it, with an optimizer of its own.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdbev import artifact
from qdbev.artifact import Seal
from qdbev.config import Config, Stage, TrainConfig, to_dict
from qdbev.data.dataset import FrameDataset
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.quant.prepare import enable
from train.distributed import World
from train.loop import Run, fit, total_steps
from train.stage_loss import Guide


@dataclass(frozen=True, kw_only=True)
class Output:
    """A student's file, of which state and log of each stage lie beside it as `<name>.stage<k>`, and how it comes about.

    `resume` continues in the last stage that left a state, or at the beginning where none did. `first_step` are the steps that the
    student has behind it. Every `keep_every` epochs, and where a stage begins and ends, a student is kept as `<name>.stage<k>.step<n>.pt`.
    """

    path: Path
    teacher: Seal
    resume: bool = False
    first_step: int = 0
    keep_every: float | None = None

    def save(self, model: BEVFormer, config: Config, facts: dict[str, Any], suffix: str = "") -> None:
        """Seal `model` as the student, or with a suffix as one on the way to it."""
        path = self.path.with_name(f"{self.path.stem}{suffix}.pt")
        artifact.save_checkpoint(path, kind="student", config=to_dict(config), weights=model.state_dict(), parent=self.teacher, facts=facts)


def run_stages(
    student: BEVFormer, teacher: BEVFormer, frames: FrameDataset, config: Config, output: Output, device: torch.device, world: World
) -> dict[str, Any]:
    """Train `student` in place through `config.quant.stages`; facts about them.

    Args:
        teacher: The float model, on `device`; read by stages that distill.

    Raises:
        ArtifactError: The state to resume from belongs to another run.
        DivergenceError: A loss or a gradient is no longer finite.
    """
    runs = _runs(config, len(frames), teacher, output, device, world)
    done = [index for index, run in enumerate(runs) if run.state_path.is_file()]
    begin = max(done, default=0) if output.resume else 0
    if not output.resume and world.is_main:
        for run in runs:
            run.state_path.unlink(missing_ok=True)
    facts: list[dict[str, Any]] = []
    for stage, run in list(zip(config.quant.stages, runs, strict=True))[begin:]:
        enable(student.requires_grad_(True), stage.groups)  # in this order: a quantizer that is off has nothing to learn
        facts.append(fit(student, frames, dataclasses.replace(run, resume=output.resume and run.state_path.is_file())))
    return {"steps": runs[-1].first_step + facts[-1]["steps"], "final_loss": facts[-1]["final_loss"]}


def schedule_of(stage: Stage, train: TrainConfig) -> TrainConfig:
    """The float training's schedule with a stage's length and rate, without warm-up."""
    return dataclasses.replace(train, epochs=stage.epochs, learning_rate=stage.learning_rate, warmup_steps=0)


def _runs(config: Config, num_samples: int, teacher: BEVFormer, output: Output, device: torch.device, world: World) -> list[Run]:
    runs, first_step, name = [], output.first_step, output.path.stem
    for index, stage in enumerate(config.quant.stages):
        schedule = schedule_of(stage, config.train)
        guide = Guide(teacher if stage.distill else None, config, world)
        runs.append(
            Run(
                config=config,
                schedule=schedule,
                folder=output.path.parent,
                name=f"{name}.stage{index + 1}",
                title=f"{name}, stage {index + 1} of {len(config.quant.stages)}",
                device=device,
                world=world,
                loss=guide,
                balance=guide.balance,
                first_step=first_step,
                keep=_keeper(output, config, index + 1, first_step, num_samples) if world.is_main else None,
            )
        )
        first_step += total_steps(schedule, num_samples)
    return runs


def _keeper(output: Output, config: Config, stage: int, first_step: int, num_samples: int) -> Callable[[BEVFormer, int], None] | None:
    if output.keep_every is None:
        return None
    schedule = schedule_of(config.quant.stages[stage - 1], config.train)
    steps_per_epoch = num_samples // schedule.batch_size
    every, last = max(round(output.keep_every * steps_per_epoch), 1), total_steps(schedule, num_samples)

    def keep(model: BEVFormer, step: int) -> None:
        if step % every == 0 or step == last:
            done = first_step + step
            output.save(model, config, {"stage": stage, "steps": done, "epochs": done / steps_per_epoch}, f".stage{stage}.step{step}")

    return keep
