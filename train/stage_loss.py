"""The loss of one stage of training: the detection loss and, where the stage distills, the distance from the float teacher."""

import torch

from qdbev.config import Config
from qdbev.detector import Detector, Output, State
from qdbev.schema import Batch
from train.criterion import Losses, detection_loss
from train.distill import Balance, distillation_loss
from train.distributed import World


class StageLoss:
    """The loss of one stage. A frozen teacher runs on the same frames as the student, with a state of its own.

    Args:
        teacher: The float model on the training's device; None where the stage does not distill.
        config: Loss weights (train) and the form of distillation (quant.distill).
        world: All training processes; counts of objects and scales of losses are averaged over them.
    """

    def __init__(self, teacher: Detector | None, config: Config, world: World) -> None:
        self._teacher = teacher.eval().requires_grad_(False) if teacher is not None else None
        self._config = config
        self._world = world
        self.balance = Balance(config.quant.distill, world.mean)

    def __call__(self, output: Output, batch: Batch, history: list[Batch]) -> Losses:
        """Compute the losses of the student's `output` on `batch`, as the network saw it, after the frames of `history`, oldest first."""
        losses = detection_loss(output, batch.boxes, batch.labels, self._config.train, self._world.mean)
        if self._teacher is None:
            return losses
        taught = self._teacher_output(batch, history)
        visible = self._teacher.visibility(batch)
        distillation = distillation_loss(output, taught, visible, self._config.quant.distill, self._config.train)
        distill = self.balance(distillation, losses.total.detach())
        return losses._replace(total=losses.total + distill, distill=distill)

    @torch.no_grad()
    def _teacher_output(self, batch: Batch, history: list[Batch]) -> Output:
        state = history_state(self._teacher, history)
        with torch.autocast(batch.images.device.type, dtype=torch.float16, enabled=self._config.train.amp and batch.images.is_cuda):
            return self._teacher(batch, state)[0]


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
