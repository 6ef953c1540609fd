"""The training loop on a small network and world: resuming, many processes, and errors that say what went wrong."""

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_networks import TRAINED
from small_trainings import CPU, interrupted_after

from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.config import Config, override
from qdbev.data.dataset import FrameDataset
from qdbev.recipes import RECIPES
from qdbev.restore import restore
from train import loop
from train.criterion import detection_loss
from train.distributed import World
from train.grid_mask import grid_mask
from train.loop import Run
from train.stability import DivergenceError
from train.teacher import main, train

SETTINGS = {**TRAINED, "train.epochs": "2", "train.warmup_steps": "2", "train.grid_mask": "0.5", "model.dropout": "0.1"}


def small(root: Path, **changes: str) -> Config:
    settings = {**SETTINGS, "data.root": str(root), **changes}
    return override(RECIPES["micro"](), [f"{name}={value}" for name, value in settings.items()])


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "float.log.jsonl").read_text().splitlines()]


def test_a_resumed_run_continues_bit_for_bit(tiny_world, tmp_path):
    config = small(tiny_world)
    whole = train(config, tmp_path / "whole", CPU, World(), resume=False)
    with interrupted_after(5):
        train(config, tmp_path / "parts", CPU, World(), resume=False)
    parts = train(config, tmp_path / "parts", CPU, World(), resume=True)

    assert [line["loss"] for line in log(tmp_path / "whole")] == [line["loss"] for line in log(tmp_path / "parts")]
    weights = [artifact.load_checkpoint(path, "teacher")[1] for path in (whole, parts)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    seal, model = restore(whole)
    assert seal.facts.steps == 8
    assert not model.training


def test_resuming_without_a_state_or_with_another_config_is_refused(tiny_world, tmp_path):
    with pytest.raises(ArtifactError, match="float.state.pt does not exist"):
        train(small(tiny_world), tmp_path, CPU, World(), resume=True)
    train(small(tiny_world, **{"train.epochs": "1"}), tmp_path, CPU, World(), resume=False)
    with pytest.raises(ArtifactError, match=r"another config \(differs in train, schedule\)"):
        train(small(tiny_world), tmp_path, CPU, World(), resume=True)


def test_a_state_that_an_earlier_version_saved_is_resumed_with_the_same_losses(tiny_world, tmp_path):
    """The state was saved on 2026-11-29 by commit 18d7a6c after four of six steps; the expected losses are those of its last two."""
    (tmp_path / "float.state.pt").write_bytes(lzma.decompress((Path(__file__).with_name("format1") / "float.state.pt.xz").read_bytes()))
    sizes = {"embed_dim": "4", "num_heads": "1", "ffn_dim": "4", "bev_hw": "(4,4)", "rotate_center": "(2.0,2.0)", "num_query": "6"}
    layers = {"decoder_layers": "1", "num_levels": "1", "backbone.width": "1", "backbone.depths": "(1,1)", "backbone.out_stages": "(1,)"}
    model = {f"model.{name}": value for name, value in (sizes | layers).items()}
    config = small(tiny_world, **model, **{"train.epochs": "1.5", "quant.calibration_samples": "32"})
    train(config, tmp_path, CPU, World(), resume=True)
    assert [line["step"] for line in log(tmp_path)] == [5, 6]
    assert [line["loss"] for line in log(tmp_path)] == pytest.approx([8.343657493591309, 9.753094673156738], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_names_of_its_samples(tiny_world, tmp_path, monkeypatch):
    real = loop.history_state
    monkeypatch.setattr(loop, "history_state", lambda model, history: real(model, history) * torch.nan)
    with pytest.raises(DivergenceError, match=r"loss is nan at step 1, samples [0-9a-f]{32}, [0-9a-f]{32}"):
        train(small(tiny_world), tmp_path, CPU, World(), resume=False)
    assert not (tmp_path / "teacher.pt").exists()


def test_a_batch_that_does_not_divide_or_exceeds_the_data_is_refused(tiny_world, tmp_path):
    with pytest.raises(ValueError, match="batch_size 2 does not divide among 3 processes"):
        train(small(tiny_world), tmp_path, CPU, World(0, 3), resume=False)
    with pytest.raises(ValueError, match="8 training samples are fewer than train.batch_size 9"):
        train(small(tiny_world, **{"train.batch_size": "9"}), tmp_path, CPU, World(), resume=False)


def test_processes_share_out_every_batch(tiny_world, tmp_path):
    config = small(tiny_world)
    frames = FrameDataset(config.data, config.model.pc_range, "train", training=True, seed=0)

    def tokens(world: World) -> list[list[str]]:
        run = Run(config=config, schedule=config.train, folder=tmp_path, name="x", device=CPU, world=world, loss=detection_loss)
        return [current.tokens for _, current in loop.batches(frames, run, 0, 4)]

    parts = zip(tokens(World(0, 2)), tokens(World(1, 2)), strict=True)
    assert [first + second for first, second in parts] == tokens(World(0, 1))


def test_two_processes_give_the_loss_curve_of_one(tiny_world, tmp_path):
    changes = {"data.root": str(tiny_world), "model.dropout": "0.0", "train.epochs": "1", "train.batch_size": "2"}
    options = ["--recipe", "micro", "--device", "cpu", *(f"--set={name}={value}" for name, value in {**SETTINGS, **changes}.items())]
    main(["--run", str(tmp_path / "one"), *options])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--", "train.teacher"]
    command, environment = [*launcher, "--run", str(tmp_path / "two"), *options], {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([line["loss"] for line in log(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "train.epoch=3"), "error: --set 'train.epoch=3': train has no 'epoch'"),
        (("--set", "data.root=absent"), "error: no dataset at absent"),
        (("--device", "cuda:7"), "error: --device cuda:7 needs an NVIDIA GPU"),
    ],
)
def test_bad_command_lines_are_one_clear_error(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        main(["--run", str(tmp_path), "--recipe", "micro", *arguments])
    assert not list(tmp_path.glob("*.pt"))


def test_grid_mask_keeps_stripes_and_zeroes_the_squares_between():
    images = torch.ones(2, 3, 40, 60)
    assert torch.equal(grid_mask(images, 0.0, np.random.default_rng(0)), images)
    masked = grid_mask(images, 1.0, np.random.default_rng(3))
    assert torch.equal(masked[0, 0], masked[1, 2])
    rows, columns = masked[0, 0].all(1), masked[0, 0].all(0)
    assert 0 < rows.sum() < 40 and 0 < columns.sum() < 60
    assert torch.equal(masked[0, 0].bool(), rows[:, None] | columns[None, :])
