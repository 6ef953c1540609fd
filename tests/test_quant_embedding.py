"""Embedding tables, weight only: policy, values, training, reload."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.recipes import micro
from qdbev.quant.calibrate import calibrate
from qdbev.quant.config import Bits, GroupBits, QuantConfig
from qdbev.quant.layers import QuantEmbedding, quant_layers, step_parameters, weight_of
from qdbev.quant.prepare import describe, enable, prepare, table
from qdbev.quant.quantizer import fake_quantize
from qdbev.settings import ConfigError

W4A6 = Bits(weight=4, activation=6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = nn.Embedding(9, 8), nn.Embedding(9, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.encoder.weight + self.decoder(torch.arange(9)))


def policy(**changes: object) -> QuantConfig:
    return QuantConfig(**{"group_bits": (GroupBits(group="encoder", bits=W4A6),), "embedding_bits": 4, **changes})


def calibrated(rules: QuantConfig) -> Net:
    torch.manual_seed(0)
    net = prepare(Net().eval(), rules)
    calibrate(net, lambda: net(torch.randn(2, 9, 8)), "max")
    return net


def test_tables_have_their_own_bits_and_the_first_matching_pattern_decides():
    rows = {row.name: row for row in describe(calibrated(policy()))}
    assert rows["encoder"][1:] == ("Embedding", 4, None, "on")
    assert rows["decoder"][1:] == ("Embedding", 4, None, "on")
    rows = {row.name: row for row in describe(calibrated(policy(float_layers=("encoder",), edge_layers=("decoder",), embedding_bits=3)))}
    assert rows["encoder"][1:] == ("Embedding", None, None, "float")
    assert rows["decoder"].weight_bits == 8
    plain = prepare(Net(), policy(embedding_bits=None))
    assert type(plain.encoder) is nn.Embedding
    assert ["encoder", "Embedding", "-", "-", "float"] in [line.split() for line in table(describe(plain)).splitlines()]
    assert ["encoder", "Embedding", "4", "-", "on"] in [line.split() for line in table(describe(calibrated(policy()))).splitlines()]


def test_the_whole_table_and_its_rows_read_as_quantized():
    net = calibrated(policy(range_mode="step"))
    layer = net.encoder
    step = (weight_of(layer).abs().amax(1, keepdim=True) / 7).detach()
    assert layer.weight_quantizer.log_step.numel() == 9
    coarse = layer.weight_quantizer.step(weight_of(layer))
    assert (coarse >= step * (1 - 1e-6)).all() and (coarse <= step * 1.125).all()
    expected = fake_quantize(weight_of(layer), coarse, -7, 7)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer(torch.tensor([[3, 1]])), expected[[3, 1]][None])
    assert layer.num_embeddings == 9


def test_one_step_a_weight_leaves_tables_a_step_a_row():
    net = calibrated(policy(per_channel=False))
    assert net.head.weight_quantizer.log_step.numel() == 1
    assert net.encoder.weight_quantizer.log_step.numel() == 9


def test_a_table_keeps_its_name_trains_and_comes_back():
    before = dict(Net().named_parameters())
    net = calibrated(policy())
    assert {name for name, _ in net.named_parameters() if not name.endswith("log_step")} == set(before)
    weight_of(net.encoder).requires_grad_()
    net(torch.randn(9, 8)).square().sum().backward()
    assert weight_of(net.encoder).grad.any() and net.encoder.weight_quantizer.log_step.grad.any()
    assert len(step_parameters(net)) == 2 + 2
    fresh = prepare(Net(), policy())
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(9, 8)
    assert torch.equal(fresh(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_a_table_is_switched_with_its_group():
    net = calibrated(policy())
    enable(net, ("encoder",))
    assert net.encoder.weight is not weight_of(net.encoder)
    assert torch.equal(net.decoder.weight, weight_of(net.decoder))
    enable(net, ())
    assert torch.equal(net.encoder.weight, weight_of(net.encoder))


def test_a_table_that_pads_is_refused():
    net = Net()
    net.encoder = nn.Embedding(9, 8, padding_idx=0)
    with pytest.raises(ValueError, match="padding_idx or max_norm"):
        prepare(net, policy())


def test_widths_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="embedding_bits is 9"):
        policy(embedding_bits=9)


def test_every_table_of_the_network_is_quantized():
    config = micro()
    model = BEVFormer(config.model)
    prepare(model, dataclasses.replace(config.quant, embedding_bits=4))
    tables = {name: layer.num_embeddings for name, layer in quant_layers(model) if isinstance(layer, QuantEmbedding)}
    assert tables == {
        "encoder.bev_embedding": 625,
        "encoder.row_embed": 25,
        "encoder.col_embed": 25,
        "decoder.query_embedding": 100,
    }
