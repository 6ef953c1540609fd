"""What a stage of quantization-aware training minimises: the detection loss and, where it distills, the distance from the teacher."""

import torch

from qdbev.config import Config
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.schema import Batch, BevOutput
from train.criterion import Losses, detection_loss
from train.distill import Balance, distillation_loss, look
from train.distributed import World
from train.loop import history_bev


class Guide:
    """The loss of one stage. A frozen teacher sees what the student sees and carries a BEV of its own through the history.

    Args:
        teacher: The float model on the training's device; None where the stage does not distill.
        config: Loss weights (train) and the form of distillation (quant.distill).
        world: All processes, over which counts and scales are averaged.
    """

    def __init__(self, teacher: BEVFormer | None, config: Config, world: World) -> None:
        self._teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self._config = config
        self._world = world
        self.balance = Balance(config.quant.distill, world.mean)

    def __call__(self, output: BevOutput, batch: Batch, history: list[Batch]) -> Losses:
        """`train.loop.Loss`."""
        losses = detection_loss(output, batch.boxes, batch.labels, self._config.train, self._world.mean)
        if self._teacher is None:
            return losses
        sight = look(self._teacher.encoder.pillars, batch.lidar2img, (batch.images.shape[-2], batch.images.shape[-1]))
        distillation = distillation_loss(output, self._taught(batch, history), sight, self._config.quant.distill, self._config.train)
        distill = self.balance(distillation, losses.total.detach())
        return losses._replace(total=losses.total + distill, distill=distill)

    @torch.no_grad()
    def _taught(self, batch: Batch, history: list[Batch]) -> BevOutput:
        prev_bev = history_bev(self._teacher, history)
        has_prev = batch.has_prev if prev_bev is not None else None
        with torch.autocast(batch.images.device.type, dtype=torch.float16, enabled=self._config.train.amp and batch.images.is_cuda):
            return self._teacher(batch.images, batch.lidar2img, batch.can_bus, prev_bev, has_prev)
