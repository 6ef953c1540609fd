"""View-guided distillation: losses that measure how far a quantized student is from its float teacher.

Source: QD-BEV (arXiv:2308.10515), section 4; docs/distillation.md says which parts are the paper's and which are ours.

B batch, N cameras, C width, h w a feature level, K BEV cells, Q queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qdbev.config import TrainConfig
from qdbev.detector import Output
from qdbev.quant.config import DistillConfig
from qdbev.settings import ConfigError


class Distillation(NamedTuple):
    """Distances of the student from the teacher in one batch: differentiable scalars, which `Balance` weights."""

    features: Tensor
    head: Tensor


def distillation_loss(student: Output, teacher: Output, visible: Tensor | None, config: DistillConfig, train: TrainConfig) -> Distillation:
    """Compute the distillation losses of one batch in float32, also under autocast and for outputs of other types.

    The teacher gets no gradient.

    Args:
        visible: (B, N, K) bool, true where camera n sees BEV cell k (`Detector.visibility`).
        train: Weights of classes and box codes in the head's divergence.

    Raises:
        ConfigError: The form needs a BEV, and the detector has none.
    """
    image_learns = config.form in ("image", "product")
    cameras = torch.stack(
        [
            channel_divergence(ours if image_learns else ours.detach(), theirs, config).mean((-2, -1))
            for ours, theirs in zip(student.image_features, teacher.image_features, strict=True)
        ]
    ).mean(0)  # (B, N)
    if config.form == "image":
        features = cameras.mean()
    elif student.bev is None or teacher.bev is None or visible is None:
        raise ConfigError(f"quant.distill.form is {config.form!r}, which needs BEV features; this detector has none: choose 'image'")
    else:
        cells = channel_divergence(student.bev, teacher.bev, config)  # (B, K)
        features = _bev_loss(cameras, cells, visible, config)
    head = head_divergence(student, teacher, train) if config.head else torch.zeros_like(features)
    return Distillation(features, head)


def channel_divergence(student: Tensor, teacher: Tensor, config: DistillConfig) -> Tensor:
    """Compute the divergence of the student at each location: tau^2 / C times the sum over channels of p log(p / q) - p + q.

    p and q are the softmax over channels of the teacher's and the student's features, divided by the temperature tau. The terms -p + q
    sum to zero over channels; with them each single term has its minimum at q = p, however the locations are weighted.

    Args:
        student: (B, N, C, h, w) or (B, K, C) features.
        teacher: Features of the same shape; they get no gradient.

    Returns:
        float32 of the shape of `student` without the channels. Its mean over an image is the paper's L_img, its mean over a BEV L_bev.
    """
    log_q = (student.float() / config.temperature).log_softmax(2)
    log_p = (teacher.detach().float() / config.temperature).log_softmax(2)
    p = log_p.exp()
    terms = p * (log_p - log_q) - p + log_q.exp()
    return terms.sum(2) * (config.temperature**2 / student.shape[2])


def _bev_loss(cameras: Tensor, cells: Tensor, visible: Tensor, config: DistillConfig) -> Tensor:
    """Combine the divergences of cameras (B, N) and BEV cells (B, K) to the scalar loss of the form that `config` selects."""
    if config.form == "bev":
        return cells.mean()
    camera_map = (cameras[..., None] * visible).sum(1)  # (B, K)
    if config.form == "product":
        return (camera_map * cells).sum(1).mean()
    return (normalize_weights(camera_map, visible.any(1)) * cells).mean()


def normalize_weights(weights: Tensor, counted: Tensor) -> Tensor:
    """Scale `weights` (B, K) so that each sample's mean over its `counted` cells (B, K) is one.

    All other cells get weight one, and so do all cells of a sample whose counted weights are all zero.
    """
    weights = weights.clamp(min=0)  # rounding may leave a divergence of zero slightly negative
    mean = (weights * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    known = counted & (mean > 0)
    return torch.where(known, weights / mean.where(mean > 0, 1.0), 1.0)


def head_divergence(student: Output, teacher: Output, train: TrainConfig) -> Tensor:
    """Compute the scalar distance of classes and boxes from the teacher's, query by query, in units of the detection loss.

    The student starts from the teacher's weights, so its queries correspond to the teacher's. Boxes are weighted by the teacher's
    confidence. Classes have no weight: the divergence of two Bernoulli distributions is small where both probabilities are near zero, and
    false positives must add to the loss.
    """
    logits, target = student.cls_logits.float(), teacher.cls_logits.detach().float()  # (layers, B, Q, classes)
    p = target.sigmoid()
    cls = p * (F.logsigmoid(target) - F.logsigmoid(logits)) + (1 - p) * (F.logsigmoid(-target) - F.logsigmoid(-logits))
    confidence = target.sigmoid().amax(-1)  # (layers, B, Q)
    code_weights = logits.new_tensor(train.code_weights)
    box = ((student.box_code.float() - teacher.box_code.detach().float()).abs() * code_weights).sum(-1)  # (layers, B, Q)
    num_objects = confidence.sum((1, 2)).clamp(min=1)
    layers = (train.cls_weight * cls.sum((1, 2, 3)) + train.box_weight * (box * confidence).sum((1, 2))) / num_objects
    return layers.mean()


class Balance:
    """Scales the distillation losses relative to the detection loss; the scales are fixed at the first step and saved for a resume.

    Args:
        config: Weights of the losses.
        world_mean: Returns the mean of a number over all training processes, so that all of them use the same scales.
    """

    def __init__(self, config: DistillConfig, world_mean: Callable[[float], float] = lambda n: n) -> None:
        self.config = config
        self.world_mean = world_mean
        self.scales: dict[str, float] = {}
        """Factor of each loss that was not zero so far; a resumed run needs them."""

    def __call__(self, distillation: Distillation, detection: Tensor) -> Tensor:
        """Return the weighted sum of `features` and `head`; the detection loss is used only as a scale, without gradient."""
        added = torch.zeros_like(detection)
        for name, part, weight in (("features", distillation.features, self.config.weight), ("head", distillation.head, self.config.head)):
            if weight:
                if name not in self.scales and (size := abs(self.world_mean(part.item()))):
                    self.scales[name] = weight * self.world_mean(detection.item()) / size
                added = added + self.scales.get(name, 0.0) * part
        return added
