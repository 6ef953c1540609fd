"""The packed form restores exactly the same forward, every byte is counted, and damaged files are refused."""

import copy
import zlib

import pytest
import torch
from torch import Tensor, nn

from qdbev.quant.calibrate import calibrate
from qdbev.quant.config import Bits, QuantConfig, RangeMode
from qdbev.quant.layers import WeightLayer, quant_layers, step_parameters, weight_of
from qdbev.quant.pack import PackError, _float_bytes, _Reader, pack, packed_parts, paper_bytes, round_floats_to_half, unpack
from qdbev.quant.prepare import enable, prepare


class Net(nn.Module):
    """A network with every kind of layer, a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 5, 3, 1, 1, bias=False)
        self.encoder = nn.ModuleDict({"table": nn.Embedding(16, 5), "norm": nn.LayerNorm(5)})
        self.decoder, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        nn.init.normal_(self.encoder["norm"].weight)
        nn.init.normal_(self.encoder["norm"].bias)
        self.register_buffer("shift", torch.randn(5))
        self.register_buffer("derived", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.neck(self.backbone(x).relu()).flatten(2).transpose(1, 2)
        return self.head(self.decoder(self.encoder["norm"](x + self.encoder["table"].weight + self.shift)).relu())


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def policy(bits: Bits, **changes: object) -> QuantConfig:
    return QuantConfig(**{"bits": bits, "edge_layers": ("head",), "embedding_bits": 4, **changes})


def fresh(rules: QuantConfig) -> Net:
    """A prepared network with other weights, as it is built from the config before unpacking."""
    torch.manual_seed(99)
    return prepare(Net().eval(), rules)


def student(rules: QuantConfig) -> Net:
    torch.manual_seed(3)
    net = Net().eval()
    with torch.no_grad():
        net.neck.weight[2] = 0  # a dead channel
        net.backbone.weight[1] *= 1e-7  # and one that hardly counts, as folded norms leave
    prepare(net, rules)
    calibrate(net, lambda: net(images()), "mse")
    for parameter in step_parameters(net):
        parameter.data += 0.3 * torch.randn_like(parameter)  # as if trained
    return net


CASES = [(weight, mode, per_channel) for weight in range(2, 9) for mode in ("fixed", "clip", "step") for per_channel in (True, False)]


@pytest.mark.parametrize(("weight", "mode", "per_channel"), CASES)
def test_unpacking_gives_the_same_forward_to_the_bit(weight: int, mode: RangeMode, per_channel: bool) -> None:
    rules = policy(Bits(weight=weight, activation=6), range_mode=mode, per_channel=per_channel)
    net, other = student(rules), fresh(rules)
    data = pack(net)
    unpack(data, other)
    for seed in (1, 2):
        assert torch.equal(other(images(seed)), net(images(seed)))
    assert pack(other) == data
    assert torch.equal(copy.deepcopy(other)(images()), net(images()))


@pytest.mark.parametrize("mode", ["fixed", "clip", "step"])
def test_an_unpacked_student_can_be_trained_on(mode: RangeMode) -> None:
    rules = policy(Bits(weight=4, activation=6), range_mode=mode)
    other = fresh(rules)
    unpack(pack(student(rules)), other)
    other(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
    assert len(step_parameters(other)) == (0 if mode == "fixed" else 9)


def test_groups_that_are_off_keep_their_float_weights() -> None:
    rules = policy(Bits(weight=4, activation=6))
    net, other = student(rules), fresh(rules)
    whole = net(images())
    enable(net, ("backbone", "decoder"))
    unpack(pack(net), other)
    assert torch.equal(other(images()), net(images()))
    assert torch.equal(other.neck.weight, net.neck.weight)
    enable(other, ("backbone", "neck", "encoder", "decoder", "head"))
    assert torch.equal(other(images()), whole)  # the ranges were kept too


def test_four_bit_weights_are_two_a_byte_and_steps_one_byte() -> None:
    rules = policy(Bits(weight=4, activation=6))
    net = student(rules)
    parts = packed_parts(net)
    assert parts["weights"] == 162 / 2 + 270 / 2 + 36 / 2 + 21  # backbone, neck, decoder of 35 weights; the head at 8 bits
    assert parts["embeddings"] == 16 * 5 / 2
    inputs, channels, header = 4, 6 + 5 + 16 + 7 + 3, 3
    assert parts["steps"] == inputs + channels + 6 * header
    assert parts["flags"] == 1 + 9
    round_floats_to_half(net)
    assert packed_parts(net)["floats"] == 2 * (6 + 7 + 3 + 5 + 5 + 5) + 6
    assert parts["floats"] == 4 * (6 + 7 + 3 + 5 + 5 + 5) + 6
    assert len(pack(net)) == len(zlib.compress(zlib.decompress(pack(net)), 9))
    assert len(zlib.decompress(pack(net))) == sum(packed_parts(net).values())


def test_two_bit_weights_are_four_a_byte() -> None:
    net = student(policy(Bits(weight=2, activation=6)))
    assert packed_parts(net)["weights"] == -(-162 // 4) + -(-270 // 4) + -(-35 // 4) + 21


def test_every_parameter_counts_at_the_same_bits_in_the_papers_count() -> None:
    model = nn.ModuleDict({"head": nn.Linear(10, 3), "decoder": nn.Embedding(7, 5)})
    assert paper_bytes(model, 4) == (33 + 35) / 2
    prepare(model, policy(Bits(weight=4, activation=6), edge_layers=()))
    assert paper_bytes(model, 4) == (33 + 35) / 2


def test_rounding_floats_to_half_changes_what_is_not_quantized_and_nothing_else() -> None:
    net = student(policy(Bits(weight=4, activation=6)))
    net.head.bias.data[0] = 1e6  # beyond float16
    before = {name: value.clone() for name, value in net.state_dict().items()}
    round_floats_to_half(net)
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"backbone.bias", "decoder.bias", "head.bias", "shift", "encoder.norm.weight", "encoder.norm.bias"}
    assert after["head.bias"][0] == 1e6
    assert torch.equal(after["decoder.bias"], before["decoder.bias"].half().float())
    packed = pack(net)
    round_floats_to_half(net)
    assert pack(net) == packed
    other = fresh(policy(Bits(weight=4, activation=6)))
    unpack(packed, other)
    assert torch.equal(other(images()), net(images()))


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ([1.0, 1.125, 0.0625, 15 * 2.0**16], 3 + 4),
        ([1.0, 1.0625], 1 + 4),  # five significant bits, which float16 has
        ([1.0, 2.0**-32], 1 + 4),  # too many octaves for a byte and float16; bfloat16
        ([0.0, -1.5], 1 + 4),
        ([0.0, -1.5e30], 1 + 8),
        ([0.1, 0.2], 1 + 8),
        ([1e-45], 3 + 1),
        ([float("nan")], 1 + 4),
    ],
)
def test_a_float_array_takes_the_shortest_form_that_holds_it(values: list[float], size: int) -> None:
    array = torch.tensor(values)
    data = _float_bytes(array)
    assert len(data) == size
    torch.testing.assert_close(_Reader(data).floats(len(values)), array, atol=0, rtol=0, equal_nan=True)


def test_weights_are_stored_as_the_forward_uses_them() -> None:
    rules = policy(Bits(weight=3, activation=6))
    net, other = student(rules), fresh(rules)
    unpack(pack(net), other)
    for (_, layer), (_, unpacked) in zip(quant_layers(net), quant_layers(other), strict=True):
        if isinstance(layer, WeightLayer):
            assert torch.equal(weight_of(unpacked), layer.weight_quantizer(weight_of(layer)))


def test_bytes_of_another_model_or_damaged_ones_are_refused() -> None:
    rules = policy(Bits(weight=4, activation=6))
    data = pack(student(rules))
    raw = zlib.decompress(data)
    with pytest.raises(PackError, match="damaged"):
        unpack(data[:-10], fresh(rules))
    with pytest.raises(PackError, match="cut off or belongs to another model"):
        unpack(zlib.compress(raw[:-1]), fresh(rules))
    with pytest.raises(PackError, match="1 bytes are left over"):
        unpack(zlib.compress(raw + b"x"), fresh(rules))
    with pytest.raises(PackError, match="version 2, this code reads 1"):
        unpack(zlib.compress(b"\x02" + raw[1:]), fresh(rules))
    with pytest.raises(PackError, match="another model"):
        unpack(data, fresh(policy(Bits(weight=5, activation=6))))
    with pytest.raises(ValueError, match="no quantizers"):
        pack(Net())
