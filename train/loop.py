"""The training loop of float and quantization-aware training: it reads queues of frames, trains a model and saves its state."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

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
from qdbev.detector import Detector, Output, State
from qdbev.facts import TrainingFacts
from qdbev.schema import Batch
from train.distributed import World
from train.grid_mask import grid_mask
from train.optimizer import build_optimizer, learning_rate, set_learning_rate
from train.stability import QuantizerMonitor

SAVE_EVERY_SECONDS = 120.0
"""Longest time in seconds between two saved states, which are also saved after each epoch: a killed run loses no more work than this."""

_FREE_DATA_SETTINGS = ("root", "stored_hw", "workers")
"""Settings of the data that may change between a saved state and its continuation, because a training's numbers do not depend on them."""


class StepLosses(NamedTuple):
    """Losses of one training step, all weighted.

    total: () the value that is minimised, the sum of the others.
    cls, box: (decoder layers,) each.
    distill: () zero where nothing is distilled.
    """

    total: Tensor
    cls: Tensor
    box: Tensor
    distill: Tensor


class Loss(Protocol):
    """The loss of a training. It may have a state of its own, which a resumed run loads."""

    def __call__(self, output: Output, batch: Batch, history: list[Batch]) -> StepLosses:
        """Compute the losses of the network's `output` for `batch`; `history` are the frames before, oldest first."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Return the state to save."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load a state that `state_dict` returned."""
        ...


class DivergenceError(FloatingPointError, ValueError):
    """Raised when the loss or a gradient is no longer finite."""


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
    loss: Loss
    title: str = "training"
    """Text before the progress bar."""
    resume: bool = False
    """Continue from the saved state."""
    first_step: int = 0
    """Number of steps of earlier stages. Samples and masks continue from there; the learning rate starts anew."""
    keep: Callable[[Detector, int], None] | None = None
    """Called with the model and the number of finished steps after every step, and once before the first."""

    @property
    def state_path(self) -> Path:
        """Path of the state from which `--resume` continues."""
        return self.folder / f"{self.name}.state.pt"

    @property
    def log_path(self) -> Path:
        """Path of the log, which has one JSON line for each step."""
        return self.folder / f"{self.name}.log.jsonl"


@dataclass
class Learner:
    """Model and optimizer of a training. With many processes `ddp_model` is DistributedDataParallel around `model`, else `model` itself."""

    model: Detector
    ddp_model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, model: Detector, schedule: TrainConfig, device: torch.device) -> Self:
        """Build a learner around `model`, which is moved to `device` and set to training mode."""
        model.to(device).train()
        amp = schedule.amp and device.type == "cuda"
        return cls(model, model, build_optimizer(model, schedule), torch.amp.GradScaler(device.type, enabled=amp))


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
    learner = Learner.of(model, run.schedule, run.device)
    monitor = QuantizerMonitor(model)
    step, last_loss = _resume(learner, run) if run.resume else (0, math.nan)
    if run.world.size > 1:
        learner.ddp_model = DistributedDataParallel(model, broadcast_buffers=False)
    begin = saved = time.monotonic()
    if step == 0:
        _keep(run, model, step)
    with _log(run, step) as log, _progress_bar(run, step, num_steps) as bar:
        for history, current in batches(frames, run, step, num_steps):
            set_learning_rate(learner.optimizer, rate := learning_rate(run.schedule, step, steps_per_epoch))
            losses, norm = _monitored_step(monitor, learner, history, current, run, step)
            step += 1
            means = {name: run.world.mean(part.sum().item()) for name, part in losses._asdict().items()}
            last_loss = means.pop("total")
            log(step=step, loss=last_loss, **means, grad_norm=norm, learning_rate=rate, **monitor.log(step - 1, last_loss))
            bar.set_postfix(loss=f"{last_loss:.3f}", refresh=False)
            bar.update()
            if step == num_steps or step % steps_per_epoch == 0 or time.monotonic() - saved > SAVE_EVERY_SECONDS:
                _save(learner, run, step, last_loss)
                saved = time.monotonic()
            _keep(run, model, step)
    return Fitted(step, run.schedule.epochs, round(time.monotonic() - begin, 1), last_loss)


def _check_batch_size(run: Run, num_samples: int) -> None:
    size = run.schedule.batch_size
    if size % run.world.size:
        raise ValueError(f"train.batch_size {size} does not divide among {run.world.size} processes; choose a multiple")
    if num_samples < size:
        raise ValueError(f"{num_samples} training samples are fewer than train.batch_size {size}; choose a smaller batch")


def _keep(run: Run, model: Detector, step: int) -> None:
    if run.keep is not None:
        run.keep(model, step)


def train_step(learner: Learner, history: list[Batch], current: Batch, run: Run, step: int) -> tuple[StepLosses, float]:
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
    if not losses.total.isfinite():
        raise DivergenceError(
            f"loss is {losses.total.item()} at step {step + 1}, samples {', '.join(current.tokens)}; look at these samples, "
            "lower train.learning_rate, and continue with --resume"
        )
    learner.optimizer.zero_grad(set_to_none=True)
    scaler.scale(losses.total).backward()
    scaler.unscale_(learner.optimizer)
    norm = nn.utils.clip_grad_norm_(learner.model.parameters(), run.schedule.max_grad_norm)
    if not (norm.isfinite() or scaler.is_enabled()):
        raise DivergenceError(
            f"gradient norm is {norm.item()} at step {step + 1}, samples {', '.join(current.tokens)}; look at these samples, "
            "lower train.learning_rate, and continue with --resume"
        )
    scaler.step(learner.optimizer)
    scaler.update()
    return StepLosses(*(part.detach() for part in losses)), norm.item()


def _monitored_step(
    monitor: QuantizerMonitor, learner: Learner, history: list[Batch], current: Batch, run: Run, step: int
) -> tuple[StepLosses, float]:
    """Do a `train_step` under the monitor; a failure's message names the quantizers that became unstable first."""
    try:
        with monitor.collect(step):
            return train_step(learner, history, current, run, step)
    except DivergenceError as error:
        raise DivergenceError(f"{error}; {monitor.summary()}") from error


@torch.no_grad()
def history_state(model: Detector, history: list[Batch]) -> State:
    """Compute the state after the frames of `history`, in evaluation mode as upstream; None without history."""
    was_training = model.training
    model.eval()
    state: State = None
    for batch in history:
        state = model.advance(batch, state)
    model.train(was_training)
    return state


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
    run.loss.load_state_dict(state["balance"])
    return state["step"], state["loss"]


def _save(learner: Learner, run: Run, step: int, last_loss: float) -> None:
    if not run.world.is_main:
        return
    state = {
        "step": step,
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "balance": run.loss.state_dict(),
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
    run.folder.mkdir(parents=True, exist_ok=True)
    kept = run.log_path.read_text().splitlines()[:first_step] if first_step and run.log_path.exists() else []
    with run.log_path.open("w") as file:
        file.writelines(line + "\n" for line in kept)
        yield lambda **values: (file.write(json.dumps(values) + "\n"), file.flush())


def _progress_bar(run: Run, first_step: int, num_steps: int) -> tqdm:
    return tqdm(total=num_steps, initial=first_step, desc=run.title, unit="step", disable=not run.world.is_main)
