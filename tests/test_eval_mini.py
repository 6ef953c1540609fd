"""A smoke run on nuScenes-mini uses its own splits from the tables to the metrics, and warns that the scores are not comparable."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_networks import settings

from eval import evaluate, run
from qdbev.config import Config, override
from qdbev.data import build_infos
from qdbev.recipes import RECIPES
from synthetic.config import WORLDS, WorldConfig
from synthetic.generate import generate
from train.distributed import World
from train.teacher import train

VERSION = "v1.0-mini"
SETTINGS = settings(
    data__version=VERSION, data__train_split="mini_train", data__val_split="mini_val", data__workers="0", model__encoder_layers="2"
)


class MiniWorld(WorldConfig):
    """A world with the scene names of mini: one of mini_train and the two of mini_val."""

    @property
    def scene_names(self) -> tuple[str, ...]:
        return ("scene-0061", "scene-0103", "scene-0916")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini") / "world"
    micro = dataclasses.replace(WORLDS["micro"](), name="mini", num_train=1, num_val=2, num_samples=3)
    generate(MiniWorld(**dataclasses.asdict(micro)), root)
    (root / "v1.0-trainval").rename(root / VERSION)
    return root


@pytest.fixture
def config(mini: Path) -> Config:
    return override(RECIPES["micro"](), [f"data.root={mini}", *SETTINGS])


def command(main: Callable[[], None], *arguments: object) -> None:
    """Run an entry point with command-line arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        main()


def test_mini_is_prepared_with_its_own_splits(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_infos.main(["--root", str(mini), "--version", VERSION, "--workers", "2"])
    assert "splits: {'mini_train': 3, 'mini_val': 6}" in capsys.readouterr().out


def test_mini_trains_and_is_scored_with_a_warning(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config, tmp_path, torch.device("cpu"), World(), resume=False)
    run.main(["--model", str(tmp_path / "teacher.pt")])
    metrics = json.loads((tmp_path / "eval" / "teacher_pt" / "metrics.json").read_text())
    assert metrics["data"] == {"version": VERSION, "split": "mini_val"}
    assert metrics["frames"] == 6
    assert re.search(r"warning: .*v1\.0-mini .*mini_val .*\b6 frames", capsys.readouterr().err)


@pytest.mark.parametrize("absent", [[], ["bus"]])
def test_only_mini_is_always_warned_about(absent: list[str]) -> None:
    def warned(version: str) -> list[str]:
        return evaluate.warnings({"absent": absent, "frames": 81, "data": {"version": version, "split": "some"}})

    assert len(warned("v1.0-trainval")) == len(absent)
    assert warned(VERSION)[:-1] == warned("v1.0-trainval")
    assert "v1.0-mini is for smoke runs: some is 81 frames" in warned(VERSION)[-1]
