"""The attention forms whose cost is compared give equal results, and the measurement reports what it found."""

import dataclasses
import json

import pytest
import torch
from golden_model import forward, inputs, micro_config

from bench import attention_cost
from bench.attention_cost import Case
from bench.padded_attention import PaddedCrossAttention, pad_attention
from qdbev.config import Config
from qdbev.data.config import DataConfig
from qdbev.detectors.bevformer.attention import CameraCrossAttention
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.recipes import RECIPES


def encoded(model: BEVFormer) -> torch.Tensor:
    """Return the BEV of a second frame, (1, 400, 64)."""
    torch.manual_seed(1)
    prev_bev = torch.randn(1, 400, 64)
    with torch.no_grad():
        return forward(model, inputs(1, 0), prev_bev).bev


def test_a_network_with_the_official_padded_attention_gives_the_same_bev():
    config = micro_config(shifted_reference=False)
    model = BEVFormer(config).eval()
    for layer in model.encoder.layers:
        torch.nn.init.normal_(layer.spatial.deformable_attention.sampling_offsets.weight, std=0.1)
        torch.nn.init.normal_(layer.spatial.deformable_attention.attention_weights.weight, std=0.1)
    ours = encoded(model)
    pad_attention(model.encoder, config)
    assert all(type(layer.spatial) is PaddedCrossAttention for layer in model.encoder.layers)
    torch.testing.assert_close(encoded(model), ours, atol=1e-5, rtol=0)


def test_padded_attention_equals_ours_where_samples_see_other_cameras():
    config = dataclasses.replace(micro_config(shifted_reference=False), num_levels=2)
    ours, padded = CameraCrossAttention(config).eval(), PaddedCrossAttention(config).eval()
    torch.nn.init.normal_(ours.deformable_attention.sampling_offsets.weight, std=0.1)
    padded.load_state_dict(ours.state_dict())
    visible = (torch.rand(2, 6, 10) < 0.4).float()
    visible[0, :, 0], visible[1, 3] = 0, 0  # a query that no camera sees, a camera that sees none
    given = torch.randn(2, 10, 64), torch.randn(2, 6, 23, 64), torch.rand(2, 6, 10, 4, 2), visible, [(3, 5), (2, 4)]
    torch.testing.assert_close(padded(*given), ours(*given), atol=1e-5, rtol=0)


def test_the_measured_rig_has_its_front_camera_ahead_and_the_feature_sizes_of_the_network():
    lidar2img, image_hw = attention_cost.rig(RECIPES["tiny"]())
    assert image_hw == (480, 800)
    assert lidar2img.shape == (1, 6, 4, 4)
    assert RECIPES["base"]().model.level_hw((928, 1600)) == [(116, 200), (58, 100), (29, 50), (15, 25)]
    ahead = lidar2img[0, 0] @ torch.tensor([0.0, 20.0, 0.0, 1.0])  # lidar frame: y is ahead
    u, v = (ahead[:2] / ahead[2]).tolist()
    assert ahead[2] > 0
    assert abs(u - 400) < 30
    assert 0 < v < 450


def shrunken() -> Config:
    """Return a configuration that is named tiny but is small enough for a quick test."""
    return Config(name="tiny", data=DataConfig(root="none", image_scale=0.2), model=dataclasses.replace(micro_config(False), num_query=10))


@pytest.mark.parametrize(("part", "backward"), [("operator", False), ("operator", True), ("encoder", False), ("model", False)])
def test_every_part_gives_the_same_result_in_both_forms(part, backward):
    build = {"operator": attention_cost._operator, "encoder": attention_cost._encoder, "model": attention_cost._model}[part]
    results = []
    for form in next(case.forms for case in attention_cost.CASES if case.part == part):
        torch.manual_seed(0)
        work, parts = build(shrunken(), form, backward)
        outputs = work()
        assert all(seconds > 0 for seconds in parts.values())
        results.append(outputs)
    assert len(results[0]) == {"operator": 5 if backward else 1, "encoder": 1, "model": 3}[part]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_forms_that_differ_are_refused():
    case = Case("tiny", "operator", False, ("gathered", "dense"), 1)
    ones = [torch.ones(3).numpy()]
    assert attention_cost._largest_difference(case, ones, [torch.ones(3).numpy() + 5e-5]) > 0
    with pytest.raises(ValueError, match="gathered and dense differ by 1.0e-03"):
        attention_cost._largest_difference(case, ones, [torch.ones(3).numpy() + 1e-3])


def test_the_command_writes_its_measurements(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(attention_cost, "CASES", (Case("tiny", "operator", False, ("gathered", "dense"), 1),))
    attention_cost.main(["--out", str(tmp_path / "cost.json")])
    written = json.loads((tmp_path / "cost.json").read_text())
    row = written["rows"][0]
    assert row["dense"]["peak_mib"] > 5  # the samples of one camera at 2500 queries alone take more
    assert row["gathered"]["peak_mib"] > 5
    assert 0 <= row["largest_difference"] < attention_cost.ATOL
    assert row["time_ratio"] > 0
    assert row["memory_ratio"] == row["dense"]["peak_mib"] / row["gathered"]["peak_mib"]
    assert {"commit", "torch"} <= written["made"].keys()
    assert "tiny operator forward" in capsys.readouterr().err


def test_forms_that_do_not_fit_are_reported_without_ratios():
    row = attention_cost.compare(Case("micro", "operator", False, ("gathered", "dense"), 1), limit=1 << 26)
    assert all("0.06 GiB" in row[form]["failed"] for form in ("gathered", "dense"))
    assert "time_ratio" not in row


def test_a_form_that_exceeds_its_time_limit_is_ended(monkeypatch):
    monkeypatch.setattr(attention_cost, "TURN_LIMIT_S", 0.0)
    row = attention_cost.compare(Case("micro", "operator", False, ("gathered", "dense"), 1), limit=1 << 36)
    assert all("0 s" in row[form]["failed"] for form in ("gathered", "dense"))
