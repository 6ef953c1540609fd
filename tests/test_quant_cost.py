"""Bit operations equal counts by hand."""

import pytest
import torch
from torch import Tensor, nn

from qdbev.ops.matmul import Matmul
from qdbev.ops.msda import MultiScaleDeformableAttention
from qdbev.quant.bops import Cost, bops, costs, float_bops
from qdbev.quant.calibrate import calibrate
from qdbev.quant.config import Bits, QuantConfig
from qdbev.quant.prepare import enable, prepare


class Net(nn.Module):
    """A network with one layer of each kind, whose decoder runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(4, 6, 3, 2, 1, groups=2)
        self.encoder = nn.ModuleDict({"scores": Matmul(), "sample": MultiScaleDeformableAttention()})
        self.decoder, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x).flatten(2).transpose(1, 2)  # (B, 12, 6)
        x = x + self.encoder["scores"](x, x.transpose(1, 2)).softmax(-1) @ x
        B, Q, _ = x.shape
        offsets, logits = x.new_zeros(B, Q, 2, 1, 1, 2), x.new_zeros(B, Q, 2, 1, 1)
        x = x + self.encoder["sample"](x.view(B, Q, 2, 3), x.new_full((B, Q, 2), 0.4), offsets, logits, [(3, 4)])
        return self.head(self.decoder(self.decoder(x)))


MACS = {
    "backbone": 6 * 3 * 4 * (2 * 9),  # 3x4 positions, two input channels in each group
    "encoder.scores": 12 * 12 * 6,
    "decoder": 12 * 6 * 6,
    "head": 12 * 6 * 2,
}


def images(batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, 6, 8)


def net() -> Net:
    return Net().eval()


def student() -> Net:
    model = prepare(net(), QuantConfig(bits=Bits(weight=4, activation=6), edge_layers=("head",)))
    calibrate(model, lambda: model(images()), "max")
    return model


def test_layers_count_their_multiply_accumulates_each_time_they_run() -> None:
    found = costs(model := net(), lambda: model(images()))
    expected = [(name, MACS[name]) for name in ("backbone", "encoder.scores", "decoder", "decoder", "head")]
    assert [(cost.name, cost.macs) for cost in found] == expected
    assert bops(found) == float_bops(found) == 32 * 32 * sum(macs for _, macs in expected)
    assert float_bops(costs(model, lambda: model(images(3)))) == 3 * float_bops(found)
    assert not any(module._forward_hooks for module in model.modules())


def test_bits_are_those_of_both_factors() -> None:
    found = costs(model := student(), lambda: model(images()))
    assert {cost.name: cost[2:] for cost in found} == {
        "backbone": (4, 6),
        "encoder.scores": (6, 6),
        "decoder": (4, 6),
        "head": (8, 8),
    }
    assert bops(found) == 24 * MACS["backbone"] + 36 * MACS["encoder.scores"] + 2 * 24 * MACS["decoder"] + 64 * MACS["head"]
    plain = net()
    assert float_bops(found) == bops(costs(plain, lambda: plain(images())))


def test_a_group_that_is_off_counts_in_float() -> None:
    model = student()
    enable(model, ("backbone", "head"))
    found = {cost.name: cost[2:] for cost in costs(model, lambda: model(images()))}
    assert found == {"backbone": (4, 6), "encoder.scores": (32, 32), "decoder": (32, 32), "head": (8, 8)}
    assert Cost("x", 10, 4, 6).bops == 240


def test_an_error_in_the_forward_leaves_no_hooks() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        costs(model, lambda: model(torch.zeros(1, 5, 6, 8)))
    assert not any(module._forward_hooks for module in model.modules())
