"""The settings that decide a run's numbers: one frozen dataclass for each room, joined in `Config`.

A recipe (qdbev/recipes.py) builds a config, and every artifact holds its config as `to_dict` returns it.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from qdbev import settings
from qdbev.config_migrations import MIGRATIONS
from qdbev.data.config import DataConfig
from qdbev.detectors import DetectorConfig
from qdbev.quant.config import QuantConfig
from qdbev.schema import CODE_SIZE
from qdbev.settings import require


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of losses, optimizer and schedule; the defaults are those of the official BEVFormer."""

    epochs: float = 24
    """Length of the training; fractions are allowed."""
    batch_size: int = 1
    """Samples of one step over all processes."""
    learning_rate: float = 2e-4
    """Highest learning rate, which warm-up ends with."""
    backbone_lr_factor: float = 0.1
    """Factor of the image backbone's learning rate."""
    weight_decay: float = 0.01
    max_grad_norm: float = 35.0
    """Gradients are clipped to this norm."""
    warmup_steps: int = 500
    warmup_start: float = 1 / 3
    """Fraction of the learning rate at the first step; it rises linearly during warm-up."""
    final_lr_fraction: float = 1e-3
    """Fraction of the learning rate at the end of the cosine."""
    anneal: Literal["epoch", "step"] = "epoch"
    """How often the cosine schedule changes the learning rate: once an epoch, as upstream, or every step, which short runs need."""
    cls_weight: float = 2.0
    """Weight of the classification loss, beside `box_weight`."""
    box_weight: float = 0.25
    code_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
    """Weights of the ten numbers of a box code in the box loss."""
    grid_mask: float = 0.7
    """Probability that a step masks the current images with a grid of squares; 0 switches the mask off."""
    amp: bool = True
    """Use mixed precision (float16) on a GPU; geometry and quantizers stay in float32."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, f"train.epochs is {self.epochs}, must be positive")
        require(self.batch_size >= 1, f"train.batch_size is {self.batch_size}, must be at least 1")
        require(len(self.code_weights) == CODE_SIZE, f"train.code_weights has {len(self.code_weights)} values, must have {CODE_SIZE}")
        require(self.learning_rate > 0, f"train.learning_rate is {self.learning_rate}, must be positive")
        require(0 <= self.grid_mask <= 1, f"train.grid_mask is {self.grid_mask}, must be a probability")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings that decide a run's numbers."""

    name: str
    """Name of the recipe."""
    data: DataConfig
    model: "DetectorConfig"
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        known = self.model.groups
        used = {name for stage in self.quant.stages for name in stage.groups or ()} | {entry.group for entry in self.quant.group_bits}
        unknown = sorted(used.difference(known))
        require(not unknown, f"quant: groups {', '.join(unknown)} do not exist; this detector has {', '.join(known)}")


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as plain JSON values with the format version; `from_dict` is the inverse."""
    return {"format": len(MIGRATIONS) + 1, **dataclasses.asdict(config)}


def from_dict(values: dict[str, Any]) -> Config:
    """Build a config from values that `to_dict` returned in this or an earlier version. Raises ConfigError if they are not such values."""
    return _build(settings.migrate(values, MIGRATIONS, "config"))


def override(config: Config, changes: list[str]) -> Config:
    """Apply settings of the form `a.b=value`. Raises ConfigError if one has no '=', names no field, or its value does not fit."""
    return _build(settings.override(dataclasses.asdict(config), changes))


def _build(values: dict[str, Any]) -> Config:
    settings.require_finite(values)
    return settings.build(Config, values)
