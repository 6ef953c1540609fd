"""Layers that read the same tensor share an input quantizer; others do not."""

import torch
from torch import Tensor, nn

from qdbev.quant.calibrate import calibrate
from qdbev.quant.config import Bits, QuantConfig
from qdbev.quant.prepare import enable, prepare


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        positioned = x + 1
        return self.out(self.q(positioned) * self.k(positioned) + self.v(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Attention()
        self.decoder = Attention()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x), self.decoder(x)


def calibrated(policy: QuantConfig) -> Net:
    torch.manual_seed(0)
    net = prepare(Net().eval(), policy)
    frames = torch.randn(3, 5, 8)
    calibrate(net, lambda: [net(frame) for frame in frames], "max")
    return net


POLICY = QuantConfig()


def test_layers_that_read_one_tensor_share_and_others_do_not():
    net = calibrated(POLICY)
    encoder = net.encoder
    assert encoder.q.input_quantizer is encoder.k.input_quantizer
    assert len({id(layer.input_quantizer) for layer in (encoder.q, encoder.v, encoder.out)}) == 3
    assert encoder.v.input_quantizer is net.decoder.v.input_quantizer


def test_a_shared_quantizer_is_on_while_one_of_its_layers_is():
    net = calibrated(POLICY)
    enable(net, ("encoder",))
    assert net.decoder.v.input_quantizer.enabled
    assert not net.decoder.v.weight_quantizer.enabled
    enable(net, ("decoder",))
    assert net.encoder.v.input_quantizer.enabled
    enable(net, ())
    assert not net.encoder.v.input_quantizer.enabled


def test_layers_of_different_width_do_not_share():
    net = calibrated(QuantConfig(edge_layers=("encoder.k",), bits=Bits(weight=4, activation=6)))
    assert net.encoder.q.input_quantizer is not net.encoder.k.input_quantizer


def test_a_student_with_shared_quantizers_loads_into_a_fresh_model():
    net = calibrated(POLICY)
    fresh = prepare(Net().eval(), POLICY)
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(fresh(x), net(x), atol=0, rtol=0)
