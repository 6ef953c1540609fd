"""The training loop of float and quantization-aware training: it reads queues of frames, trains a model and saves its state."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.config import Config, TrainConfig, from_dict, to_dict
from qdbev.data.collate import queue_batch
from qdbev.data.dataset import FrameDataset, start_worker
from qdbev.detector import Detector
from qdbev.facts import TrainingFacts
from qdbev.schema import Batch
from train.criterion import Losses
from train.distributed import World
from train.grid_mask import grid_mask
from train.optimizer import build_optimizer, learning_rate
from train.stability import DivergenceError, QuantizerMonitor
from train.stage_loss import StageLoss, history_state

SAVE_EVERY_SECONDS = 120.0
"""Longest time in seconds between two saved states, which are also saved after each epoch: a killed run loses no more work than this."""

_FREE_DATA_SETTINGS = ("root", "stored_hw", "workers")
"""Settings of the data that may change between a saved state and its continuation, because a training's numbers do not depend on them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of one training, besides model and data."""

    config: Config
    schedule: TrainConfig
    """Length, learning rate, batch size and masking of this training; a stage has a schedule of its own."""
    folder: Path
    """Folder for the saved state and the log."""
    name: str
    """Beginning of the names of these files."""
    device: torch.device
    world: World
    """All training processes."""
    loss: StageLoss
    title: str = "training"
    """Text before the progress bar."""
    resume: bool = False
    """Continue from the saved state."""
    first_step: int = 0
    """Number of steps of earlier stages. Samples and masks continue from there; the learning rate starts anew."""
    keep: Callable[[Detector, int], None] = lambda model, step: None
    """Called with the model and the number of finished steps after every step, and once before the first."""

    @property
    def state_path(self) -> Path:
        """Path of the state from which `--resume` continues."""
        return self.folder / f"{self.name}.state.pt"


class Learner:
    """Optimizer and gradient scaler around `model`, which is moved to `device` and set to training mode.

    With many processes `ddp_model` is DistributedDataParallel around `model`, else `model` itself.
    """

    def __init__(self, model: Detector, schedule: TrainConfig, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.ddp_model: nn.Module = self.model
        self.optimizer = build_optimizer(model, schedule)
        self.scaler = torch.amp.GradScaler(device.type, enabled=schedule.amp and device.type == "cuda")


class Fitted(NamedTuple):
    """Result of a training: steps and epochs done, its duration in seconds, and the loss of the last step."""

    steps: int
    epochs: float
    seconds: float
    final_loss: float


def fit(model: Detector, frames: FrameDataset, run: Run) -> Fitted:
    """Train `model` in place.

    Raises:
        ValueError: The batch does not divide among the processes, or there are too few samples.
        ArtifactError: `--resume` without a state, or with one of another config.
        DivergenceError: A loss is not finite; the message names the step and the samples.
    """
    _check_batch_size(run, len(frames))
    steps_per_epoch, num_steps = len(frames) // run.schedule.batch_size, total_steps(run.schedule, len(frames))
    learner = Learner(model, run.schedule, run.device)
    monitor = QuantizerMonitor(model)
    step, last_loss = _resume(learner, run) if run.resume else (0, math.nan)
    if run.world.size > 1:
        learner.ddp_model = DistributedDataParallel(model, broadcast_buffers=False)
    begin = saved = time.monotonic()
    if step == 0:
        run.keep(model, step)
    bar = tqdm(total=num_steps, initial=step, desc=run.title, unit="step", disable=not run.world.is_main)
    with _log(run, step) as log, bar:
        for history, current in batches(frames, run, step, num_steps):
            rate = learning_rate(run.schedule, step, steps_per_epoch)
            for group in learner.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            with monitor.collect(step):
                losses, norm = train_step(learner, history, current, run, step)
            step += 1
            means = {name: run.world.mean(part.sum().item()) for name, part in losses._asdict().items()}
            last_loss = means.pop("total")
            log(step=step, loss=last_loss, **means, grad_norm=norm, learning_rate=rate, **monitor.log(step - 1, last_loss))
            bar.set_postfix(loss=f"{last_loss:.3f}", refresh=False)
            bar.update()
            due = step == num_steps or step % steps_per_epoch == 0 or time.monotonic() - saved > SAVE_EVERY_SECONDS
            if due and run.world.is_main:
                _save(learner, run, step, last_loss)
                saved = time.monotonic()
            run.keep(model, step)
    return Fitted(step, run.schedule.epochs, round(time.monotonic() - begin, 1), last_loss)


def _check_batch_size(run: Run, num_samples: int) -> None:
    size = run.schedule.batch_size
    if size % run.world.size:
        raise ValueError(f"train.batch_size {size} does not divide among {run.world.size} processes; choose a multiple")
    if num_samples < size:
        raise ValueError(f"{num_samples} training samples are fewer than train.batch_size {size}; choose a smaller batch")


def train_step(learner: Learner, history: list[Batch], current: Batch, run: Run, step: int) -> tuple[Losses, float]:
    """Do one optimizer step; returns the losses (detached) and the gradient norm before clipping.

    Raises:
        DivergenceError: The loss or, without mixed precision, the gradient norm is not finite.
    """
    rng = np.random.default_rng((run.config.seed, run.first_step + step))
    scaler = learner.scaler
    with torch.autocast(run.device.type, dtype=torch.float16, enabled=scaler.is_enabled()):
        state = history_state(learner.model, history)
        current = current._replace(images=grid_mask(current.images, run.schedule.grid_mask, rng))
        output, _ = learner.ddp_model(current, state)
    full = output._replace(cls_logits=output.cls_logits.float(), box_code=output.box_code.float())
    losses = run.loss(full, current, history)
    _require_finite("loss", losses.total, step, current)
    learner.optimizer.zero_grad(set_to_none=True)
    scaler.scale(losses.total).backward()
    scaler.unscale_(learner.optimizer)
    norm = nn.utils.clip_grad_norm_(learner.model.parameters(), run.schedule.max_grad_norm)
    if not scaler.is_enabled():
        _require_finite("gradient norm", norm, step, current)
    scaler.step(learner.optimizer)
    scaler.update()
    return Losses(*(part.detach() for part in losses)), norm.item()


def _require_finite(what: str, value: Tensor, step: int, batch: Batch) -> None:
    if not value.isfinite():
        raise DivergenceError(
            f"{what} is {value.item()} at step {step + 1}, samples {', '.join(batch.tokens)}; look at these samples, "
            "lower train.learning_rate, and continue with --resume"
        )


def total_steps(schedule: TrainConfig, num_samples: int) -> int:
    """Return the number of steps of a whole training."""
    return max(round(schedule.epochs * (num_samples // schedule.batch_size)), 1)


def batches(frames: FrameDataset, run: Run, begin: int, end: int) -> Iterator[tuple[list[Batch], Batch]]:
    """Yield this process's share of each batch, as history and current frames on the run's device, for the steps `begin` to `end`."""
    size, world = run.schedule.batch_size, run.world
    keys = []
    for step in range(run.first_step + begin, run.first_step + end):
        epoch, position = divmod(step, len(frames) // size)
        if position == 0 or step == run.first_step + begin:
            order = np.random.default_rng((run.config.seed, epoch)).permutation(len(frames))
        batch = order[position * size : (position + 1) * size]
        keys.append([(epoch, int(index)) for index in batch[world.rank :: world.size]])
    loader = DataLoader(
        frames,
        batch_sampler=keys,
        collate_fn=queue_batch,
        num_workers=run.config.data.workers,
        pin_memory=run.device.type == "cuda",
        persistent_workers=run.config.data.workers > 0,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(run.config.seed),
    )
    for history, current in loader:
        yield [to_device(batch, run.device) for batch in history], to_device(current, run.device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch with all its tensors to `device`."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return [move(item) for item in value] if isinstance(value, list) else value

    return Batch(*(move(value) for value in batch))


def _resume(learner: Learner, run: Run) -> tuple[int, float]:
    """Load the state of an earlier run; returns the number of steps that it did, and its last loss."""
    seal, weights, state = artifact.load_checkpoint(run.state_path, "training")
    wanted = _fingerprint(run)
    found = _migrated(seal.config)
    if found != wanted:
        changed = [key for key in wanted if found.get(key) != wanted[key]]
        raise ArtifactError(
            f"{run.state_path} belongs to a run with another config (differs in {', '.join(changed)}); write this run to another folder"
        )
    learner.model.load_state_dict(weights)
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    run.loss.balance.scales = state["balance"]
    return state["step"], state["loss"]


def _save(learner: Learner, run: Run, step: int, last_loss: float) -> None:
    state = {
        "step": step,
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "balance": run.loss.balance.scales,
        "loss": last_loss,
    }
    artifact.save_checkpoint(
        run.state_path,
        config=_fingerprint(run),
        weights=learner.model.state_dict(),
        parent=None,
        facts=TrainingFacts(step=step),
        state=state,
    )


def _fingerprint(run: Run) -> dict[str, Any]:
    """Return the settings that decide a run's numbers, with which a saved state must agree."""
    return _comparable({**to_dict(run.config), "schedule": dataclasses.asdict(run.schedule), "first_step": run.first_step})


def _migrated(saved: dict[str, Any]) -> dict[str, Any]:
    """Bring the settings of a saved state to the present format of configs."""
    extra = {key: saved[key] for key in ("schedule", "first_step")}
    config = {key: value for key, value in saved.items() if key not in extra}
    config["data"] = {"root": "", **config["data"]}
    return _comparable({**to_dict(from_dict(config)), **extra})


def _comparable(values: dict[str, Any]) -> dict[str, Any]:
    values["data"] = {key: value for key, value in values["data"].items() if key not in _FREE_DATA_SETTINGS}
    return json.loads(json.dumps(values))


@contextlib.contextmanager
def _log(run: Run, first_step: int) -> Iterator[Callable[..., None]]:
    """Open the log; the function it yields writes one JSON line. Lines of an interrupted run after `first_step` are dropped."""
    if not run.world.is_main:
        yield lambda **values: None
        return
    path = run.folder / f"{run.name}.log.jsonl"
    run.folder.mkdir(parents=True, exist_ok=True)
    kept = path.read_text().splitlines()[:first_step] if first_step and path.exists() else []
    with path.open("w") as file:
        file.writelines(line + "\n" for line in kept)
        yield lambda **values: (file.write(json.dumps(values) + "\n"), file.flush())
