"""Official checkpoints: every key accounted for, or one error that lists what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from golden_inputs import fill_state_dict

from qdbev.artifact import ArtifactError
from qdbev.model import weights
from qdbev.model.bevformer import BEVFormer
from qdbev.model.weights import fitting_recipe, load_official, read_official
from qdbev.recipes import RECIPES
from qdbev.restore import restore
from train import official

PARAMETERS = {"tiny": (33_521_157, 643), "small": (59_463_619, 1001), "base": (69_034_947, 1089)}
"""Numbers of the official models, the ten code weights of the criterion included. 2026-11-21."""


def shapes(folder: Path, name: str) -> dict[str, list[int]]:
    return json.loads((folder / f"keys_{name}.json").read_text())


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_size_is_known_by_its_official_keys(golden_folder, name):
    parameters, tensors = PARAMETERS[name]
    keys = shapes(golden_folder, name)
    assert len(keys) == tensors
    assert fitting_recipe({key: torch.empty(shape, device="meta") for key, shape in keys.items()}) == name
    with torch.device("meta"):
        model = BEVFormer(RECIPES[name]().model)
    assert sum(p.numel() for p in model.parameters()) + 10 == parameters


@pytest.fixture
def micro_state(golden_folder) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in fill_state_dict(shapes(golden_folder, "micro")).items()}


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(micro_state):
    from golden_model import micro_config

    model = BEVFormer(micro_config(False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    micro_state["pts_bbox_head.extra"] = torch.zeros(1)
    micro_state.pop("img_neck.fpn_convs.0.conv.bias")
    micro_state["pts_bbox_head.bev_embedding.weight"] = torch.zeros(7, 64)
    with pytest.raises(ValueError, match=r"3 differences") as error:
        load_official(model, micro_state)
    for line in (
        "unknown: pts_bbox_head.extra",
        "missing: neck.output.0.bias",
        "encoder.bev_embedding.weight: (7, 64), this model has (400, 64)",
    ):
        assert line in str(error.value)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_a_published_checkpoint_becomes_a_teacher(golden_folder, tmp_path):
    state = {key: torch.from_numpy(value) for key, value in fill_state_dict(shapes(golden_folder, "tiny")).items()}
    torch.save({"state_dict": state, "meta": {"epoch": 24}, "optimizer": {}}, tmp_path / "tiny.pth")
    assert official.convert(tmp_path / "tiny.pth", tmp_path / "teacher.pt", ["data.root=/data/nuscenes"]) == "tiny"
    seal, model = restore(tmp_path / "teacher.pt")
    assert (seal.facts["image_hw"], seal.config["data"]["root"]) == ([480, 800], "/data/nuscenes")
    assert torch.equal(model.backbone.conv1.weight, state["img_backbone.conv1.weight"])


def test_a_file_that_is_no_checkpoint_or_fits_nothing_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    with pytest.raises(ArtifactError, match="does not exist"):
        read_official(path)
    path.write_bytes(b"garbage")
    with pytest.raises(ArtifactError, match="cannot be read as a weights-only checkpoint"):
        read_official(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ArtifactError, match="holds no state dict"):
        read_official(path)
    torch.save({"a": torch.zeros(1)}, path)
    monkeypatch.setattr("sys.argv", ["weights", "inspect", str(path)])
    with pytest.raises(SystemExit, match="these 1 tensors fit none of micro, tiny, small, base"):
        weights.main()
