"""The optimizer, AdamW, and its learning-rate schedule: linear warm-up, then cosine.

Source: projects/configs/bevformer/bevformer_tiny.py at 66b65f3 with the hooks of mmcv 1.4.0.
"""

import math

from torch.optim import AdamW

from qdbev.config import TrainConfig
from qdbev.detector import BACKBONE, Detector
from qdbev.quant.layers import step_parameters


def build_optimizer(model: Detector, config: TrainConfig) -> AdamW:
    """Build AdamW over all trainable parameters of `model`.

    The backbone has its own factor of the learning rate, and the learned quantization steps have no weight decay.
    """
    steps = {id(step) for step in step_parameters(model)}
    backbone, rest, scales = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = scales if id(parameter) in steps else backbone if name.startswith(f"{BACKBONE}.") else rest
            group.append(parameter)
    groups = [
        {"params": rest, "factor": 1.0},
        {"params": backbone, "factor": config.backbone_lr_factor},
        {"params": scales, "factor": 1.0, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of the groups with factor one at `step`, counted from 0 over the whole run."""
    epochs = step // steps_per_epoch if config.anneal == "epoch" else step / steps_per_epoch
    low = config.learning_rate * config.final_lr_fraction
    rate = low + 0.5 * (config.learning_rate - low) * (1 + math.cos(math.pi * epochs / config.epochs))
    if step < config.warmup_steps:
        rate *= 1 - (1 - step / config.warmup_steps) * (1 - config.warmup_start)
    return rate
