"""Runs the stages of quantization-aware training, which quantize more groups from stage to stage and may distill from the teacher.

A stage starts from the weights of the stage before it, with a new optimizer. Source: QD-BEV (arXiv:2308.10515), Algorithm 1.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qdbev import artifact
from qdbev.artifact import Seal
from qdbev.config import Config, TrainConfig, to_dict
from qdbev.data.dataset import FrameDataset
from qdbev.detector import Detector
from qdbev.facts import StudentFacts
from qdbev.quant.config import Stage
from qdbev.quant.prepare import enable
from train.distributed import World
from train.loop import Run, fit, total_steps
from train.stage_loss import StageLoss


@dataclass(frozen=True, kw_only=True)
class StudentRun:
    """Path of a student, and how its training resumes.

    Each stage saves `<name>.stage<k>.state.pt` and `<name>.stage<k>.log.jsonl` in the folder of the student `<name>.pt`.
    """

    path: Path
    """Path of the student."""
    teacher: Seal
    """Seal of the teacher, which becomes the parent in the student's seal."""
    resume: bool = False
    """Continue in the last stage that saved a state, or begin anew if no stage did."""
    first_step: int = 0
    """Number of steps that the student was trained for before these stages."""
    keep_every: float | None = None
    """Epochs after which a student is kept as `<name>.stage<k>.step<n>.pt`, besides both ends of each stage; None keeps none."""

    def save(self, model: Detector, config: Config, facts: StudentFacts, suffix: str = "") -> None:
        """Write `model` as the student, or as an intermediate student whose file name gets the suffix."""
        path = self.path.with_name(f"{self.path.stem}{suffix}.pt")
        artifact.save_checkpoint(path, config=to_dict(config), weights=model.state_dict(), parent=self.teacher, facts=facts)


def run_stages(
    student: Detector, teacher: Detector, frames: FrameDataset, config: Config, student_run: StudentRun, device: torch.device, world: World
) -> StudentFacts:
    """Train `student` in place through `config.quant.stages`.

    Args:
        teacher: Float model on `device`, from which stages with `distill` learn.

    Returns:
        Facts for the student's seal: the number of all its training steps (`steps`) and the last loss (`final_loss`); none without stages.

    Raises:
        ArtifactError: The state to resume from belongs to another run.
        DivergenceError: A loss or a gradient is no longer finite.
    """
    runs = _runs(config, len(frames), teacher, student_run, device, world)
    done = [index for index, run in enumerate(runs) if run.state_path.is_file()]
    begin = max(done, default=0) if student_run.resume else 0
    if not student_run.resume and world.is_main:
        for run in runs:
            run.state_path.unlink(missing_ok=True)
    facts = StudentFacts()
    for stage, run in list(zip(config.quant.stages, runs, strict=True))[begin:]:
        student.requires_grad_(True)  # before `enable`, which turns off the gradients of disabled quantizers
        enable(student, student.groups if stage.groups is None else stage.groups)
        fitted = fit(student, frames, dataclasses.replace(run, resume=student_run.resume and run.state_path.is_file()))
        facts = StudentFacts(steps=run.first_step + fitted.steps, final_loss=fitted.final_loss)
    return facts


def schedule_of(stage: Stage, train: TrainConfig) -> TrainConfig:
    """Return the schedule of float training with the stage's length and learning rate, without warm-up."""
    return dataclasses.replace(train, epochs=stage.epochs, learning_rate=stage.learning_rate, warmup_steps=0)


def _runs(config: Config, num_samples: int, teacher: Detector, student_run: StudentRun, device: torch.device, world: World) -> list[Run]:
    runs, first_step, name = [], student_run.first_step, student_run.path.stem
    for number, stage in enumerate(config.quant.stages, 1):
        run = Run(
            config=config,
            schedule=schedule_of(stage, config.train),
            folder=student_run.path.parent,
            name=f"{name}.stage{number}",
            title=f"{name}, stage {number} of {len(config.quant.stages)}",
            device=device,
            world=world,
            loss=StageLoss(teacher if stage.distill else None, config, world),
            first_step=first_step,
        )
        if student_run.keep_every is not None and world.is_main:
            run = dataclasses.replace(run, keep=_keeper(student_run, run, number, num_samples))
        runs.append(run)
        first_step += total_steps(run.schedule, num_samples)
    return runs


def _keeper(student_run: StudentRun, run: Run, stage: int, num_samples: int) -> Callable[[Detector, int], None]:
    """Return the callback that keeps students of one stage."""
    steps_per_epoch, num_steps = num_samples // run.schedule.batch_size, total_steps(run.schedule, num_samples)
    every = max(round(student_run.keep_every * steps_per_epoch), 1)

    def keep(model: Detector, step: int) -> None:
        if step % every == 0 or step == num_steps:
            done = run.first_step + step
            facts = StudentFacts(stage=stage, steps=done, epochs=done / steps_per_epoch)
            student_run.save(model, run.config, facts, f".stage{stage}.step{step}")

    return keep
