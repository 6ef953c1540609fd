"""The detection loss: focal classification and L1 boxes, summed over decoder layers.

Source: bevformer dense_heads/bevformer_head.py at 66b65f3; focal loss arXiv:1708.02002. B batch, Q queries, G objects.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qdbev.config import TrainConfig
from qdbev.detector import Output
from qdbev.nn.box_code import encode
from train.matcher import ALPHA, match


class Losses(NamedTuple):
    """Weighted losses: `total` (), which is minimised, is the sum of `cls` and `box` (decoder layers,) and of `distill` ().

    `distill` is zero where nothing is distilled.
    """

    total: Tensor
    cls: Tensor
    box: Tensor
    distill: Tensor


def detection_loss(
    output: Output, boxes: list[Tensor], labels: list[Tensor], config: TrainConfig, world_mean: Callable[[float], float] = lambda n: n
) -> Losses:
    """Compute the detection losses of one batch. They are not finite where predictions are not; upstream replaces such a loss by zero.

    Args:
        boxes: For each sample (G, 9), gravity-centre boxes as in `schema.Frame`.
        labels: For each sample (G,).
        world_mean: Returns the mean of a number over all training processes, for the number of objects: DDP averages gradients.
    """
    codes = [encode(sample) for sample in boxes]
    weights = output.box_code.new_tensor(config.code_weights)
    cls, box = [], []
    for cls_logits, box_code in zip(output.cls_logits, output.box_code, strict=True):
        cls_sum, box_sum, num_matched = _layer_sums(cls_logits, box_code, codes, labels, weights, config)
        num_objects = max(world_mean(float(num_matched)), 1.0)
        cls.append(config.cls_weight * cls_sum / num_objects)
        box.append(config.box_weight * box_sum / num_objects)
    cls_losses, box_losses = torch.stack(cls), torch.stack(box)
    total = cls_losses.sum() + box_losses.sum()
    return Losses(total, cls_losses, box_losses, torch.zeros_like(total))


def _layer_sums(
    cls_logits: Tensor, box_code: Tensor, codes: list[Tensor], labels: list[Tensor], code_weights: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor, int]:
    """Return the focal sum and the L1 sum of one decoder layer, not normalised, and the number of matched queries."""
    target = torch.zeros_like(cls_logits)  # (B, Q, classes)
    predicted, wanted = [], []
    for sample, (code, label) in enumerate(zip(codes, labels, strict=True)):
        query, object_ = match(cls_logits[sample], box_code[sample], code, label, config.cls_weight, config.box_weight)
        target[sample, query, label[object_]] = 1
        predicted.append(box_code[sample, query])
        wanted.append(code[object_])
    predicted_code, wanted_code = torch.cat(predicted), torch.cat(wanted)
    finite = wanted_code.isfinite().all(-1)
    box_sum = ((predicted_code - wanted_code).abs() * code_weights)[finite].sum()
    return sigmoid_focal_sum(cls_logits, target), box_sum, len(wanted_code)


def sigmoid_focal_sum(logits: Tensor, target: Tensor) -> Tensor:
    """Sum the focal loss (gamma 2, alpha 0.25) over all entries; `target` is one where a query has that class, else zero."""
    p = logits.sigmoid()
    wrong = target * (1 - p) + (1 - target) * p
    weight = (target * ALPHA + (1 - target) * (1 - ALPHA)) * wrong**2
    return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight).sum()
