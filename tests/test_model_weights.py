"""Official checkpoints: every key accounted for, or one error that lists what does not fit."""

import re
from collections import Counter, OrderedDict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import key_shapes
from golden_inputs import fill_state_dict
from golden_model import micro_config
from torch import Tensor

from qdbev import artifact
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.official import KEYS
from qdbev.nn.state_dict import NUM_SHOWN, StateDictError, load_official, read_state_dict
from qdbev.recipes import RECIPES
from qdbev.restore import restore
from train import official

PARAMETERS = {"tiny": (33_521_157, 643, "33.52"), "small": (59_463_619, 1001, "59.46"), "base": (69_034_947, 1089, "69.03")}
"""Parameters, tensors and printed millions of the official models, with the ten code weights of the loss. Recorded 2026-11-21."""


def numbered(keys: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Fill each tensor with its own number; a tensor takes one element in memory and on disk."""
    return {key: torch.tensor(float(index)).expand(shape) for index, (key, shape) in enumerate(keys.items())}


def save(path: Path, state: dict[str, Tensor], **meta: object) -> Path:
    """Save a checkpoint as mmcv does."""
    torch.save({"meta": {"mmcv_version": "1.4.0", **meta}, "state_dict": OrderedDict(state), "optimizer": {"param_groups": []}}, path)
    return path


def inspect(path: Path, capsys: pytest.CaptureFixture) -> str:
    official.main(["inspect", str(path)])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_size_is_known_by_its_official_keys(name):
    parameters, tensors, _ = PARAMETERS[name]
    keys = key_shapes(name)
    assert len(keys) == tensors
    assert official.fitting_recipe({key: torch.empty(shape, device="meta") for key, shape in keys.items()}) == name
    with torch.device("meta"):
        model = BEVFormer(RECIPES[name]().model)
    assert sum(p.numel() for p in model.parameters()) + 10 == parameters


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_and_shapes_go_both_ways(name):
    keys = {key: shape for key, shape in key_shapes(name).items() if key not in KEYS.ignored}
    with torch.device("meta"):
        own = BEVFormer(RECIPES[name]().model).state_dict()
        ours = [KEYS.translate(key, torch.empty(shape), own) for key, shape in keys.items()]
    assert KEYS.shapes(own) == keys
    assert {name: value.shape for pieces in ours for name, value in pieces.items()} == {name: value.shape for name, value in own.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_checkpoint_of_each_size_becomes_a_teacher(tmp_path, capsys, name):
    keys = key_shapes(name)
    state = numbered(keys)
    path = save(
        tmp_path / "official.pth", {f"module.{key}": value for key, value in state.items()}, epoch=24, CLASSES=("car",), hook_msgs={}
    )
    assert inspect(path, capsys) == f"{path}: {name}, {len(keys)} tensors, {PARAMETERS[name][2]} M parameters\n"
    teacher = tmp_path / "teacher.pt"
    official.main(["convert", "--checkpoint", str(path), "--teacher", str(teacher)])
    assert capsys.readouterr().out == f"{teacher}: {name}\n"
    seal, ours, _ = artifact.load_checkpoint(teacher, "teacher")
    teacher.unlink()  # up to 276 MB
    assert (seal.facts.official, seal.config["name"]) == (artifact.sha256(path), name)
    landed = Counter()
    for value in ours.values():
        assert value.min() == value.max(), "no tensor of ours mixes two of theirs"
        landed[int(value.flatten()[0])] += value.numel()
    assert landed == {index: value.numel() for index, (key, value) in enumerate(state.items()) if key not in KEYS.ignored}


def test_a_published_checkpoint_runs_with_its_own_numbers(tmp_path):
    state = {key: torch.from_numpy(value) for key, value in fill_state_dict(key_shapes("tiny")).items()}
    path = save(tmp_path / "tiny.pth", state)
    assert official.convert(path, tmp_path / "teacher.pt", ["data.root=/data/nuscenes"]) == "tiny"
    seal, model = restore(tmp_path / "teacher.pt")
    assert (seal.facts.image_hw, seal.config["data"]["root"]) == ((480, 800), "/data/nuscenes")
    assert torch.equal(model.backbone.conv1.weight, state["img_backbone.conv1.weight"])
    packed = state["pts_bbox_head.transformer.decoder.layers.2.attentions.0.attn.in_proj_weight"]
    attention = model.decoder.layers[2].self_attention
    assert torch.equal(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]), packed)


@pytest.fixture
def micro_state() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in fill_state_dict(key_shapes("micro")).items()}


@pytest.fixture
def micro_model() -> BEVFormer:
    return BEVFormer(micro_config(False))


def test_what_does_not_fit_is_listed_by_official_names_and_nothing_is_loaded(micro_model, micro_state):
    before = {key: value.clone() for key, value in micro_model.state_dict().items()}
    attention = "pts_bbox_head.transformer.decoder.layers.0.attentions.0.attn"
    micro_state["pts_bbox_head.extra"] = torch.zeros(1)
    micro_state["lidar.weight"] = micro_state["lidar.bias"] = torch.zeros(1)
    micro_state.pop("img_neck.fpn_convs.0.conv.bias")
    micro_state.pop(f"{attention}.in_proj_bias")
    micro_state["pts_bbox_head.bev_embedding.weight"] = torch.zeros(7, 64)
    micro_state[f"{attention}.in_proj_weight"] = torch.zeros(63, 64)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_official(micro_model, micro_state, KEYS)
    assert str(error.value).splitlines() == [
        "the checkpoint does not fit this model: 7 differences: 2 missing, 3 unknown, 2 of another shape",
        f"  shape of {attention}.in_proj_weight: (63, 64), this model has (192, 64)",
        "  shape of pts_bbox_head.bev_embedding.weight: (7, 64), this model has (400, 64)",
        "  missing: img_neck.fpn_convs.0.conv.bias",
        f"  missing: {attention}.in_proj_bias",
        "  unknown: pts_bbox_head.extra",
        "  unknown: all of lidar (2 tensors)",
    ]
    assert all(torch.equal(value, micro_model.state_dict()[key]) for key, value in before.items())


def test_a_long_list_of_differences_is_cut_with_their_number(micro_model, micro_state):
    removed = [key for key in micro_state if ".layers." in key][:33]
    for key in removed:
        micro_state.pop(key)
    with pytest.raises(ValueError, match="33 differences: 33 missing") as error:
        load_official(micro_model, micro_state, KEYS)
    lines = str(error.value).splitlines()
    assert (len(lines), lines[-1]) == (1 + NUM_SHOWN + 1, "  ... and 13 more")
    assert sum("missing: pts_bbox_head." in line for line in lines) == 20


def test_a_detector_without_its_head_takes_one_line_and_the_recipes_that_can_start_from_it_are_named(micro_model, micro_state):
    headless = {key: value for key, value in micro_state.items() if not key.startswith("pts_bbox_head.")}
    missing = len(micro_state) - len(headless) - 1
    with pytest.raises(ValueError, match="does not fit") as error:
        load_official(micro_model, headless, KEYS)
    assert str(error.value).splitlines() == [
        f"the checkpoint does not fit this model: {missing} differences: {missing} missing, 0 unknown, 0 of another shape",
        f"  missing: all of pts_bbox_head ({missing} tensors)",
    ]
    with pytest.raises(ValueError, match="a ResNet-50 initialisation, without pts_bbox_head: use .* --recipe tiny --pretrained"):
        official.fitting_recipe(headless)


def test_a_checkpoint_that_fits_no_recipe_is_told_which_one_is_nearest(tmp_path):
    state = numbered(key_shapes("base"))
    state["pts_bbox_head.bev_embedding.weight"] = torch.zeros(1).expand(100 * 100, 256)
    path = save(tmp_path / "x.pth", state)
    with pytest.raises(SystemExit) as error:
        official.main(["inspect", str(path)])
    assert str(error.value).splitlines() == [
        "error: these 1089 tensors fit none of micro, tiny, small, base; nearest is base, with 1 difference: 0 missing, 0 unknown, "
        "1 of another shape",
        "  shape of pts_bbox_head.bev_embedding.weight: (10000, 256), this model has (40000, 256)",
    ]


@pytest.mark.parametrize(("name", "prefix", "said"), [
    ("tiny", "", "a ResNet-50 initialisation, without pts_bbox_head: use python -m train.teacher --recipe tiny --pretrained"),
    ("base", "backbone.", "a ResNet-101 initialisation with deformable convolutions, without pts_bbox_head: "
     "use python -m train.teacher --recipe small or base --pretrained"),
])  # fmt: skip
def test_a_backbone_is_recognised_and_never_taken_for_a_detector(tmp_path, capsys, name, prefix, said):
    keys = {key.replace("img_backbone.", prefix): shape for key, shape in key_shapes(name).items() if "img_backbone" in key}
    path = save(tmp_path / "backbone.pth", numbered(keys))
    assert inspect(path, capsys) == f"{path}: {said}\n"
    with pytest.raises(ValueError, match=f"is no detector of this project but {said}"):
        official.convert(path, tmp_path / "teacher.pt", [])
    assert not (tmp_path / "teacher.pt").exists()


def test_a_file_that_is_no_checkpoint_or_fits_nothing_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(StateDictError, match="does not exist"):
        read_state_dict(path)
    for content in (b"garbage", b""):
        path.write_bytes(content)
        with pytest.raises(StateDictError, match="cannot be read as a weights-only checkpoint: .+; copy or download it again"):
            read_state_dict(path)
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StateDictError, match="cannot be read as a weights-only checkpoint: .+; copy or download it again"):
        read_state_dict(path)
    for content, held in (
        ({"seal": {}, "weights": {}}, "seal, weights"),
        ({"state_dict": {}}, "state_dict"),
        ([1], "list"),
        ({}, "nothing"),
    ):
        torch.save(content, path)
        with pytest.raises(StateDictError, match=f"holds no state dict, but {held}"):
            read_state_dict(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="these 1 tensors fit none of micro, tiny, small, base"):
        official.fitting_recipe(read_state_dict(path))


@pytest.mark.parametrize(("foreign", "named"), [(np.float64(0.5), r"numpy\.\S*multiarray\.scalar"), (Fraction(1, 2), "fractions.Fraction")])
def test_a_file_with_other_classes_says_how_to_save_its_tensors_alone(tmp_path, monkeypatch, foreign, named):
    path = save(tmp_path / "x.pth", {"a": torch.ones(2)}, best_score=foreign)
    with pytest.raises(StateDictError, match=f"beside tensors it holds {named}, and reading such an object can run code") as error:
        read_state_dict(path)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*)"', str(error.value))[1])
    assert torch.equal(read_state_dict(tmp_path / "weights.pth")["a"], torch.ones(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checkpoint_with_a_number_that_is_none_is_refused_by_the_tensor(tmp_path, value):
    state = {"img_backbone.conv1.weight": torch.zeros(3), "img_backbone.bn1.bias": torch.tensor([0.0, value])}
    with pytest.raises(StateDictError, match=r"has NaN or infinity in img_backbone\.bn1\.bias; copy it again"):
        read_state_dict(save(tmp_path / "x.pth", state))
    state["img_neck.a"] = torch.tensor(value)
    with pytest.raises(StateDictError, match=r"in img_backbone\.bn1\.bias and 1 more"):
        read_state_dict(save(tmp_path / "x.pth", state))


def test_a_text_file_is_refused_with_words(tmp_path):
    (tmp_path / "a.pth").write_text("hello\nworld")
    with pytest.raises(StateDictError, match="a.pth cannot be read as a weights-only checkpoint: the file is no archive of tensors"):
        read_state_dict(tmp_path / "a.pth")
