"""Quantization of a small network: folding, policy, stages, training, reload, export."""

import copy
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qdbev.ops.contract import OPSET
from qdbev.ops.matmul import Matmul
from qdbev.quant.calibrate import calibrate
from qdbev.quant.config import Bits, CalibrationMethod, GroupBits, LayerBits, QuantConfig, RangeMode
from qdbev.quant.export import exporting
from qdbev.quant.layers import QuantConv2d, QuantLinear, QuantOp, activation_quantizers, quant_layers, quantizers, step_parameters
from qdbev.quant.prepare import bits_of, describe, enable, fold_batch_norm, prepare, table


class Block(nn.Module):
    """Residual block with declared norm pairs and a strided shortcut."""

    norm_pairs = (("conv1", "bn1"), ("inner.product", "bn2"))

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.inner = nn.ModuleDict({"product": nn.Conv2d(8, 8, 3, 1, 1, groups=2)})
        self.bn2 = nn.BatchNorm2d(8, affine=False)
        self.downsample = nn.Sequential(nn.Conv2d(3, 8, 1, 2, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.inner["product"](self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class Mixer(nn.Module):
    """Self-attention among positions."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.scores = nn.Linear(8, 8), Matmul()

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return x + self.scores(x, x.transpose(1, 2)).softmax(-1) @ x


class Toy(nn.Module):
    """A network of five groups, two of which are layers themselves; maps (B, 3, 16, 16) to (B, 64, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck = Block(), nn.Conv2d(8, 8, 1)
        self.encoder, self.decoder = Mixer(), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.neck(self.backbone(x)).flatten(2).transpose(1, 2)
        return self.head(self.decoder(self.encoder(x)))


W4A6, W8A8 = Bits(weight=4, activation=6), Bits()

GROUPS = tuple(name for name, _ in Toy().named_children())
LEAVES = {
    "backbone.conv1", "backbone.inner.product", "backbone.downsample.0", "neck", "encoder.project", "encoder.scores", "decoder.0",
    "decoder.2", "head",
}  # fmt: skip


def policy(bits: Bits, **changes: object) -> QuantConfig:
    return QuantConfig(**{"bits": bits, "edge_layers": ("head",), **changes})


def folded() -> Toy:
    """A float network whose batch norms had statistics and are folded."""
    torch.manual_seed(0)
    model = Toy()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return fold_batch_norm(model.eval())


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def quantized(bits: Bits, method: CalibrationMethod = "mse", **changes: object) -> Toy:
    model = prepare(folded(), policy(bits, **changes))
    calibrate(model, lambda: model(images()), method)
    return model


def test_folded_batch_norm_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    before = model(images())
    model = fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(images()), before, atol=1e-5, rtol=0)
    torch.testing.assert_close(fold_batch_norm(model)(images()), model(images()), atol=0, rtol=0)


def test_a_batch_norm_of_no_declared_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="1.bn"):
        fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ModuleDict({"bn": nn.BatchNorm2d(3)})))


def test_float_layers_come_before_layer_bits_before_edge_layers_before_the_group_before_the_rest() -> None:
    edge, own, rest = Bits(weight=7, activation=7), Bits(weight=2, activation=5), Bits(weight=5, activation=3)
    rules = QuantConfig(
        bits=rest,
        group_bits=(GroupBits(group="decoder", bits=W4A6), GroupBits(group="neck", bits=W4A6)),
        edge=edge,
        edge_layers=("decoder.2", "decoder.4"),
        layer_bits=(LayerBits(layers="decoder.4", bits=own), LayerBits(layers="*.0", bits=own)),
        float_layers=("decoder.0",),
    )
    assert bits_of("decoder.0", rules) is None
    assert bits_of("decoder.4", rules) == bits_of("head.0", rules) == own
    assert bits_of("decoder.2", rules) == edge
    assert bits_of("decoder.1", rules) == bits_of("neck", rules) == W4A6
    assert bits_of("decoder2.1", rules) == bits_of("necks", rules) == rest
    assert {bits_of(f"{group}.x", policy(rest)) for group in GROUPS} == {rest}


def test_a_group_has_its_own_bits_whether_it_is_a_layer_or_holds_layers() -> None:
    groups = (GroupBits(group="decoder", bits=W4A6), GroupBits(group="neck", bits=Bits(weight=3, activation=5)))
    rows = {row.name: row for row in describe(prepare(folded(), policy(W8A8, group_bits=groups)))}
    widths = {name: (row.weight_bits, row.activation_bits) for name, row in rows.items()}
    assert widths.pop("neck") == (3, 5)
    assert widths.pop("decoder.0") == widths.pop("decoder.2") == (4, 6)
    assert widths.pop("encoder.scores") == (None, 8)
    assert set(widths.values()) == {(8, 8)}


def test_leaves_are_swapped_by_type_and_keep_their_parameters() -> None:
    model = folded()
    before = dict(model.named_parameters())
    prepare(model, policy(W4A6))
    kinds = {name: type(layer) for name, layer in quant_layers(model)}
    assert kinds.keys() == LEAVES
    assert kinds["neck"] is QuantConv2d and kinds["head"] is QuantLinear and kinds["encoder.scores"] is QuantOp
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert after.keys() - before.keys() == {name for name in after if name.endswith("log_step")}
    torch.testing.assert_close(model(images()), folded()(images()), atol=0, rtol=0)  # nothing is quantized yet
    assert not any(layer.training for _, layer in quant_layers(model))


def test_the_table_tells_what_runs_how() -> None:
    rows = {row.name: row for row in describe(quantized(W4A6, float_layers=("neck",)))}
    assert rows.keys() == LEAVES
    assert rows["decoder.0"][1:] == ("Linear", 4, 6, "on")
    assert rows["head"][1:] == ("Linear", 8, 8, "on")
    assert rows["neck"][1:] == ("Conv2d", None, None, "float")
    assert rows["encoder.scores"][1:] == ("Matmul", None, 6, "on")
    lines = table(list(rows.values())).splitlines()
    assert lines[0].split() == ["layer", "kind", "W", "A", "state"]
    assert ["neck", "Conv2d", "-", "-", "float"] in [line.split() for line in lines]
    assert {row.state for row in describe(prepare(folded(), policy(W4A6)))} == {"not calibrated"}


@pytest.mark.parametrize("field", ["float_layers", "edge_layers"])
def test_a_pattern_that_matches_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"'neck\.conv' match no layer"):
        prepare(folded(), policy(W8A8, **{field: ("head", "neck.conv")}))


def test_bits_of_a_group_that_does_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="no such group: tail; the groups are backbone"):
        prepare(folded(), policy(W8A8, group_bits=(GroupBits(group="neck", bits=W4A6), GroupBits(group="tail", bits=W4A6))))


def test_preparing_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="already prepared"):
        prepare(prepare(folded(), policy(W8A8)), policy(W8A8))


def test_a_leaf_used_under_two_names_is_quantized_once() -> None:
    model = folded()
    model.decoder[2] = nn.Linear(16, 16)
    model.decoder.append(model.decoder[2])
    prepare(model, policy(W8A8))
    assert model.decoder[2] is model.decoder[3] and isinstance(model.decoder[2], QuantLinear)


def test_activations_after_a_relu_become_unsigned() -> None:
    model = quantized(W4A6)
    assert model.decoder[2].input_quantizer.qrange == (0, 63)
    assert model.decoder[0].input_quantizer.qrange == (-32, 31)


def test_groups_are_switched_on_one_after_another() -> None:
    model = quantized(W4A6)
    whole, exact = model(images()), folded()(images())
    errors = []
    for count in range(len(GROUPS) + 1):
        enable(model, GROUPS[:count])
        on = {name.partition(".")[0] for name, layer in quant_layers(model) if all(q.enabled for q in quantizers(layer))}
        assert on == set(GROUPS[:count])
        errors.append((model(images()) - exact).abs().max().item())
    assert errors[0] == 0 and all(error > 0 for error in errors[1:])
    assert torch.equal(model(images()), whole)
    with pytest.raises(ValueError, match="no such group: tail"):
        enable(model, ("tail",))
    with pytest.raises(ValueError, match="'neck' has no range yet"):
        enable(prepare(folded(), policy(W8A8)), ("neck",))


@pytest.mark.parametrize(("mode", "per_channel"), [("step", True), ("clip", True), ("fixed", True), ("step", False), ("fixed", False)])
def test_training_lowers_the_loss_and_a_reload_gives_the_same_output(mode: RangeMode, per_channel: bool) -> None:
    model, learn = quantized(W4A6, range_mode=mode, per_channel=per_channel), mode != "fixed"
    enable(model, GROUPS[:4])
    target = folded()(images()).detach()
    assert len(step_parameters(model)) == (2 * 8 + 2 - 1 if learn else 0)  # two layers read one tensor and share a step
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    steps = [parameter.clone() for parameter in step_parameters(model)]
    for _ in range(40):
        loss = nn.functional.mse_loss(model.train()(images()), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert model.decoder[0].weight_quantizer.log_step.numel() == (16 if per_channel else 1)
    moved = [not torch.equal(a, b) for a, b in zip(steps, step_parameters(model), strict=True)]
    if mode == "clip":  # moves where something lies outside
        assert any(moved)
    else:
        assert sum(moved) == (2 * 7 + 2 - 1 if learn else 0)
    assert not any(moved[-2:])  # the head is off and stays where it was

    fresh = prepare(folded(), policy(W4A6, range_mode=mode, per_channel=per_channel))
    state = model.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(images(5)), model.eval()(images(5)))
    assert describe(fresh) == describe(model)
    assert torch.equal(copy.deepcopy(model)(images(5)), model(images(5)))


class Parallel(nn.Module):
    """Every kind of layer in parallel on the input, which is exact in all runtimes; in series, rounding could change an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.neck = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 1, groups=1, bias=False)
        self.encoder, self.head = Matmul(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(x), self.neck(x.relu()), self.encoder(x, x.transpose(2, 3)), self.head(x)


@pytest.mark.parametrize(
    ("bits", "mode", "per_channel"),
    [(W8A8, "fixed", True), (W4A6, "fixed", False), (W4A6, "clip", True), (W4A6, "step", True), (W4A6, "step", False)],
)
def test_the_exported_graph_gives_the_same_numbers(bits: Bits, mode: RangeMode, per_channel: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = prepare(Parallel(), policy(bits, range_mode=mode, per_channel=per_channel)).eval()
    calibrate(model, lambda: model(images()), "mse")
    for parameter in step_parameters(model):
        parameter.data += 0.5 * torch.randn_like(parameter)  # as if trained: no two steps are alike
    with warnings.catch_warnings(), exporting(model), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(),), tmp_path / "net.onnx", dynamo=True, opset_version=OPSET, verbose=False, external_data=False)

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: images(7).numpy()})
    assert len(outputs) == 4
    for actual, expected in zip(outputs, model(images(7)), strict=True):
        size = expected.abs().max().item()
        np.testing.assert_allclose(actual / size, expected.detach().numpy() / size, atol=1e-6, rtol=0)

    graph = onnx.load(tmp_path / "net.onnx").graph
    counts = Counter(node.op_type for node in graph.node)
    if mode != "fixed":
        assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 5 + 3  # activations and weights
        assert counts["Clip"] == (5 if mode == "clip" else 4)  # the head is at eight bits, which without a clip fill int8
    elif bits == W8A8:
        assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 3 + 3  # equal steps on one tensor were merged
        assert counts["Clip"] == 0
    tensors = {value.name: value for value in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in tensors]
    assert [list(tensors[node.input[1]].dims) == [] for node in weights] == [not per_channel] * 3
    zero_points = [tensors[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {value.data_type for value in zero_points} == {onnx.TensorProto.INT8}
    assert not any(onnx.numpy_helper.to_array(value).any() for value in zero_points)


@pytest.mark.parametrize("per_channel", [True, False])
def test_only_activations_are_clipped_in_export(per_channel: bool) -> None:
    model = quantized(W4A6, per_channel=per_channel)
    with exporting(model), torch.no_grad():
        program = torch.export.export(model, (images(),))
    clamps = sum("clamp" in str(node.target) for node in program.graph.nodes)
    assert clamps == sum(q.num_bits < 8 for _, layer in quant_layers(model) for q in activation_quantizers(layer)) == 9


def test_layers_switched_off_are_exported_in_float() -> None:
    model = quantized(W4A6)
    enable(model, ("neck",))
    with exporting(model), torch.no_grad():
        program = torch.export.export(model, (images(),))
    counts = Counter(str(node.target) for node in program.graph.nodes)
    assert sum(count for target, count in counts.items() if "fake_quantize" in target) == 2


def test_export_mode_leaves_no_trace_even_after_an_error() -> None:
    model = quantized(W4A6)
    expected = model(images())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="boom"), exporting(model):
        torch.testing.assert_close(model(images()), expected, atol=1e-5, rtol=0)
        assert not torch.equal(model.neck.weight, before["neck.weight"])
        raise RuntimeError("boom")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert torch.equal(model(images()), expected)


def test_export_outside_the_mode_is_refused() -> None:
    with pytest.raises(Exception, match="with exporting"):
        torch.export.export(quantized(W8A8), (images(),))
