"""View-guided distillation: the quantized student's features follow the float teacher's, most where the cameras differ.

Source: QD-BEV (arXiv:2308.10515), section 4; docs/distillation.md says what is the paper's and what is ours.

B batch, N cameras, C width, h w a feature level and S its places, K BEV cells, D pillar heights, Q queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qdbev.config import DistillConfig, TrainConfig
from qdbev.geometry import project
from qdbev.nn.box_code import from_code
from qdbev.schema import BevOutput


class Sight(NamedTuple):
    """Which camera sees what of the BEV: cells (K, 2) centres in metres; points (B, N, K, D, 2) and hit (B, N, K, D) of `project`."""

    cells: Tensor
    points: Tensor
    hit: Tensor


class Distillation(NamedTuple):
    """`features` and `head` are scalars that `Balance` weighs; image (N,) and bev () are mean divergences without a graph."""

    features: Tensor
    head: Tensor
    image: Tensor
    bev: Tensor


def look(pillars: Tensor, lidar2img: Tensor, image_hw: tuple[int, int]) -> Sight:
    """Sight of a batch: the encoder's `pillars` (D, K, 3) in cameras `lidar2img` (B, N, 4, 4), to pixels of the padded image."""
    return Sight(pillars[0, :, :2], *project(pillars, lidar2img, image_hw))


def visible_cells(sight: Sight) -> Tensor:
    """(B, N, K) bool: the camera sees some point of the cell's pillar, as spatial cross-attention counts it."""
    return sight.hit.any(-1)


def distillation_loss(student: BevOutput, teacher: BevOutput, sight: Sight, config: DistillConfig, train: TrainConfig) -> Distillation:
    """Loss of one batch, in float32 whatever the outputs are, also under autocast; the teacher gets no gradient.

    Cameras weigh the cells of their own sample, and samples are averaged. `train` has the weights of the head's parts.
    """
    image_learns = config.form in ("image", "sum", "product")
    levels = [
        place_divergence((pupil if image_learns else pupil.detach()).flatten(3), master.flatten(3), -2, config).unflatten(
            -1, pupil.shape[3:]
        )
        for pupil, master in zip(student.image_features, teacher.image_features, strict=True)
    ]  # (B, N, h, w) each
    cameras = torch.stack([level.mean((-2, -1)) for level in levels]).mean(0)  # (B, N)
    cells = place_divergence(student.bev, teacher.bev, -1, config)  # (B, K)
    weighted = cells * _foreground(teacher, sight, config) if config.foreground else cells
    if config.form == "image":
        features = cameras.mean()
    elif config.form == "bev":
        features = weighted.mean()
    elif config.form == "sum":
        features = cameras.mean() + weighted.mean()
    else:
        laid = carry(levels, sight) if config.image_map == "pixel" else cameras[..., None]  # (B, N, K or 1)
        features = _under_camera_map(weighted, laid, visible_cells(sight), config)
    head = head_divergence(student, teacher, train) if config.head else torch.zeros_like(features)
    return Distillation(features, head, cameras.detach().mean(0), cells.detach().mean())


def place_divergence(student: Tensor, teacher: Tensor, channels: int, config: DistillConfig) -> Tensor:
    """Divergence of the student from the teacher at each place: tau^2 / C times the sum over channels.

    Args:
        student: Channels in dimension `channels`, -1 or -2, places in the other of the two; float32 inside.
        teacher: As `student`; detached.

    Returns:
        `student`'s shape without the channels. The mean over places of an image is the paper's L_img, the places of a BEV are L_bev.
    """
    axis = channels if config.axis == "channel" else -3 - channels
    log_q = (student.float() / config.temperature).log_softmax(axis)
    log_p = (teacher.detach().float() / config.temperature).log_softmax(axis)
    p = log_p.exp()
    terms = p * (log_p - log_q)
    if config.generalized:
        terms = terms - p + log_q.exp()
    return terms.sum(channels) * (config.temperature**2 / student.shape[channels])


def _under_camera_map(cells: Tensor, laid: Tensor, visible: Tensor, config: DistillConfig) -> Tensor:
    """Scalar from cells (B, K) and what cameras lay on the cells they see, (B, N, K) or (B, N, 1)."""
    camera_map = (laid * visible).sum(1)  # (B, K)
    if config.form == "product":
        return (camera_map * cells).sum(1).mean()
    return (mean_one(camera_map, visible.any(1)) * cells).mean()


def mean_one(weights: Tensor, counted: Tensor) -> Tensor:
    """`weights` (B, K) scaled so that each sample's mean over its `counted` cells is one.

    One everywhere else, and throughout a sample whose counted weights are all zero: where nothing is known, cells count alike.
    """
    weights = weights.clamp(min=0)  # rounding leaves divergences of nothing on either side of zero
    mean = (weights * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
    known = counted & (mean > 0)
    return torch.where(known, weights / mean.where(mean > 0, 1.0), 1.0)


def carry(levels: list[Tensor], sight: Sight) -> Tensor:
    """(B, N, K): image maps (B, N, h, w), meaned over levels and the pillar points that the camera sees; zero where it sees none."""
    grid = (sight.points * 2 - 1).flatten(0, 1)  # (B * N, K, D, 2)
    sampled = [
        F.grid_sample(level.flatten(0, 1)[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
        for level in levels
    ]  # (B * N, K, D) each
    mean = torch.stack(sampled).mean(0).view_as(sight.hit)
    return (mean * sight.hit).sum(-1) / sight.hit.sum(-1).clamp(min=1)


def _foreground(teacher: BevOutput, sight: Sight, config: DistillConfig) -> Tensor:
    """(B, K): weight of each cell, of mean one."""
    objects = object_map(teacher, sight.cells)
    return torch.ones_like(objects).lerp(mean_one(objects, torch.ones_like(objects, dtype=torch.bool)), config.foreground)


@torch.no_grad()
def object_map(teacher: BevOutput, cells: Tensor) -> Tensor:
    """(B, K) in [0, 1]: how sure the teacher's last layer is of an object at `cells` (K, 2) metres.

    A query is a round Gaussian of its confidence's height, as wide as its box is large and no narrower than a cell.
    """
    confidence = _confidence(teacher.cls_logits[-1])  # (B, Q)
    box = from_code(teacher.box_code[-1].float())  # (B, Q, 9)
    cell = (cells[1] - cells[0]).norm()
    variance = (box[..., 3] * box[..., 4] / 4).clamp(min=cell.square())  # (B, Q)
    distance2 = (cells[:, 0] - box[..., 0:1]).square() + (cells[:, 1] - box[..., 1:2]).square()  # (B, Q, K)
    return (confidence.log()[..., None] - distance2 / (2 * variance[..., None])).amax(1).exp()


def head_divergence(student: BevOutput, teacher: BevOutput, train: TrainConfig) -> Tensor:
    """Scalar: classes and boxes of every decoder layer against the teacher's of the same query, in units of the detection loss.

    The student starts from the teacher's weights, so queries correspond. Boxes count as the teacher's confidence; classes need no such
    weight, for the divergence of two yes-or-no distributions is small by itself where both say no, and false alarms must cost.
    """
    logits, target = student.cls_logits.float(), teacher.cls_logits.detach().float()  # (layers, B, Q, classes)
    p = target.sigmoid()
    cls = p * (F.logsigmoid(target) - F.logsigmoid(logits)) + (1 - p) * (F.logsigmoid(-target) - F.logsigmoid(-logits))
    confidence = _confidence(target)  # (layers, B, Q)
    code_weights = logits.new_tensor(train.code_weights)
    box = ((student.box_code.float() - teacher.box_code.detach().float()).abs() * code_weights).sum(-1)  # (layers, B, Q)
    num_objects = confidence.sum((1, 2)).clamp(min=1)
    layers = (train.cls_weight * cls.sum((1, 2, 3)) + train.box_weight * (box * confidence).sum((1, 2))) / num_objects
    return layers.mean()


def _confidence(logits: Tensor) -> Tensor:
    """(...,) probability of the likeliest class."""
    return logits.detach().float().sigmoid().amax(-1)


class Balance:
    """What distillation adds to the detection loss; `state_dict` carries the scales of `start` over a resume.

    `world_mean` is the mean of a number over all training processes, so that all of them scale alike.
    """

    def __init__(self, config: DistillConfig, world_mean: Callable[[float], float] = lambda n: n) -> None:
        self.config = config
        self.world_mean = world_mean
        self.scales: dict[str, float] = {}

    def __call__(self, distillation: Distillation, detection: Tensor) -> Tensor:
        """Scalar with the graphs of `features` and `head`; `detection` only lends its size."""
        added = torch.zeros_like(detection)
        for name, weight in (("features", self.config.weight), ("head", self.config.head)):
            if weight:
                part = getattr(distillation, name)
                added = added + self._scale(name, part, weight, detection) * part
        return added

    def _scale(self, name: str, part: Tensor, weight: float, detection: Tensor) -> float:
        if self.config.balance == "none":
            return weight
        if self.config.balance == "follow" or name not in self.scales:
            # The plain divergence over space may be negative under a map; its size counts, for a negative scale would unlearn.
            size = abs(self.world_mean(part.item()))
            if size == 0:
                return 0.0
            self.scales[name] = weight * self.world_mean(detection.item()) / size
        return self.scales[name]

    def state_dict(self) -> dict[str, float]:
        """Scale of each part weighed so far."""
        return dict(self.scales)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the scales of `state_dict`."""
        self.scales = dict(state)
