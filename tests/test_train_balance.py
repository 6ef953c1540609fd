"""The distillation losses are scaled to the detection loss at the first step, and keep the scale later, after a resume and in processes."""

import pytest
import torch

from qdbev.quant.config import DistillConfig
from qdbev.settings import ConfigError
from train.distill import Balance, Distillation


def parts(features: float, head: float = 0.0) -> Distillation:
    return Distillation(torch.tensor(features), torch.tensor(head))


def test_a_loss_begins_at_its_weight_and_keeps_its_scale_from_then_on_even_after_a_resume():
    config = DistillConfig(weight=0.5, head=0.25)
    balance = Balance(config)
    assert balance(parts(0.0, 4.0), torch.tensor(8.0)) == 2  # a loss of zero gets no scale yet
    assert balance(parts(0.001, 4.0), torch.tensor(10.0)).item() == pytest.approx(5 + 2)
    assert balance(parts(0.0005, 2.0), torch.tensor(77.0)).item() == pytest.approx(2.5 + 1)
    resumed = Balance(config)
    resumed.scales = balance.scales
    assert resumed(parts(0.0005, 2.0), torch.tensor(3.0)).item() == pytest.approx(2.5 + 1)


def test_all_processes_use_the_same_scale():
    mine, theirs = {"loss": 0.2, "detection": 6.0}, {"loss": 0.6, "detection": 2.0}
    means = dict.fromkeys((0.2, 0.6), 0.4) | dict.fromkeys((6.0, 2.0), 4.0)
    added = []
    for process in (mine, theirs):
        balance = Balance(DistillConfig(weight=0.5), lambda number: means[round(number, 4)])
        added.append(balance(parts(process["loss"]), torch.tensor(process["detection"])).item() / process["loss"])
    assert added == pytest.approx([0.5 * 4.0 / 0.4] * 2)


def test_the_scale_has_no_gradient_and_no_sign():
    features, detection = torch.tensor(-0.1, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    Balance(DistillConfig(weight=0.5))(parts(0.0)._replace(features=features), detection).backward()
    assert features.grad.item() == pytest.approx(10)
    assert detection.grad is None or detection.grad == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "distill.temperature is 0.0, must be positive"),
        ({"weight": -0.5}, "distill.weight is -0.5, must be 0 or more"),
        ({"head": -1.0}, "distill.head is -1.0, must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**change)
