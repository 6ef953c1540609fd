"""Training in stages: the groups and the loss of each stage, resuming in the right stage, and messages when a training diverges."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from small_networks import settings
from small_trainings import CPU, interrupted_after, quantize, untrained_teacher

from qdbev import artifact
from qdbev.config import Config, override
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.recipes import progressive
from qdbev.frames import open_frames
from qdbev.quant.config import Stage
from qdbev.quant.layers import quant_layers, quantizers
from qdbev.quant.quantizer import Quantizer
from qdbev.recipes import RECIPES, at_bits
from qdbev.restore import restore
from qdbev.settings import ConfigError
from train import calibration, loop, stability, stages
from train.stability import DivergenceError, QuantizerMonitor

PLAN = (*progressive((0.25, 0.25, 0.5, 0.25), 1e-3), Stage(epochs=0.5, learning_rate=1e-3, distill=True))


@pytest.fixture
def config(tiny_world: Path) -> Config:
    config = at_bits(override(RECIPES["micro"](), settings(data__root=str(tiny_world))), "w4a6")
    return dataclasses.replace(config, quant=dataclasses.replace(config.quant, stages=PLAN))


@pytest.fixture
def teacher(config: Config, tmp_path: Path) -> Path:
    return untrained_teacher(config, tmp_path / "teacher.pt")


def log(folder: Path, name: str, stage: int) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.stage{stage}.log.jsonl").read_text().splitlines()]


def test_progressive_stages_add_one_group_after_the_other_and_the_head_with_the_decoder():
    assert [stage.groups for stage in PLAN] == [
        BEVFormerConfig.groups[:1],
        BEVFormerConfig.groups[:2],
        BEVFormerConfig.groups[:3],
        None,
        None,
    ]
    assert [stage.distill for stage in PLAN] == [False] * 4 + [True]


def test_groups_that_the_detector_does_not_have_are_refused(config):
    stages = (Stage(groups=("trunk",)),)
    with pytest.raises(ConfigError, match="groups trunk do not exist; this detector has backbone, neck, encoder, decoder, head"):
        dataclasses.replace(config, quant=dataclasses.replace(config.quant, stages=stages))


def test_each_stage_quantizes_its_groups_and_only_the_last_distills(config, teacher, tmp_path, monkeypatch):
    on, batches = [], []
    real = loop.train_step

    def watched(learner, history, current, run, step):
        layers = quant_layers(learner.model)
        on.append({name.partition(".")[0] for name, layer in layers if all(q.enabled for q in quantizers(layer))})
        batches.append(current.tokens)
        return real(learner, history, current, run, step)

    monkeypatch.setattr(loop, "train_step", watched)
    quantize(teacher, tmp_path / "s.pt", config)
    steps = [1, 1, 2, 1, 2]  # of four in an epoch
    assert on == [set(stage.groups or BEVFormerConfig.groups) for stage, count in zip(PLAN, steps, strict=True) for _ in range(count)]
    assert sorted(sum(batches[:4], [])) != sorted(batches[0] * 4)
    assert len({token for tokens in batches[:4] for token in tokens}) == 8, "the stages of one epoch share it out"
    for stage, count in enumerate(steps, 1):
        distill = [line["distill"] for line in log(tmp_path, "s", stage)]
        assert len(distill) == count
        assert all(value > 0 if stage == 5 else value == 0 for value in distill)
    seal, student = restore(tmp_path / "s.pt")
    assert seal.facts.steps == 7
    assert all(quantizer.enabled for _, layer in quant_layers(student) for quantizer in quantizers(layer))


def test_an_interrupted_run_goes_on_in_its_stage_bit_for_bit(config, teacher, tmp_path):
    quantize(teacher, tmp_path / "whole.pt", config)
    _, whole, _ = artifact.load_checkpoint(tmp_path / "whole.pt", "student")
    for num_steps in (3, 6):
        with interrupted_after(num_steps):
            quantize(teacher, tmp_path / "parts.pt", config)
        quantize(teacher, tmp_path / "parts.pt", config, resume=True)
        _, parts, _ = artifact.load_checkpoint(tmp_path / "parts.pt", "student")
        assert all(torch.equal(value, parts[name]) for name, value in whole.items()), num_steps
        for stage in (4, 5):
            losses = [[line["loss"] for line in log(tmp_path, name, stage)] for name in ("whole", "parts")]
            assert losses[0] == losses[1], (num_steps, stage)


def test_a_fresh_run_forgets_the_states_of_an_earlier_one(config, teacher, tmp_path):
    stale = tmp_path / "s.stage5.state.pt"
    stale.write_bytes(b"of another run")
    short = dataclasses.replace(config, quant=dataclasses.replace(config.quant, stages=PLAN[:1]))
    quantize(teacher, tmp_path / "s.pt", short)
    assert stale.exists(), "five stages are not this run's business"
    stale.rename(tmp_path / "s.stage2.state.pt")
    quantize(teacher, tmp_path / "s.pt", config)
    assert log(tmp_path, "s", 2)


def test_an_error_and_a_rising_loss_name_the_quantizers_that_became_unstable_first(config, teacher, caplog):
    frames = open_frames(config, "train", training=True)
    student = calibration.calibrated_student(restore(teacher)[1], config, frames, CPU)
    pairs = list(calibration.frame_pairs(frames, 2))
    monitor = QuantizerMonitor(student)
    with monitor.collect(0):
        calibration.run_sequences(student, config, pairs)
    assert monitor.summary() == "no quantizer was unstable at the last check"
    facts = monitor.log(0, 1.0)
    assert 0 <= facts["clipped_share"] < stability.MAX_CLIPPED
    assert facts["step_drift_octaves"] == 0
    steps = {name: module for name, module in student.named_modules() if isinstance(module, Quantizer) and module.axis is None}
    name, quantizer = list(steps.items())[3]
    with torch.no_grad():
        quantizer.log_step.sub_(4.0)
    assert monitor.log(1, 1.0) == {}, "quantizers are checked only every so many steps"
    with monitor.collect(stability.CHECK_EVERY):
        calibration.run_sequences(student, config, pairs)
    facts = monitor.log(stability.CHECK_EVERY, 1.0)
    assert facts["step_drift_quantizer"] == facts["clipped_quantizer"] == name
    assert facts["step_drift_octaves"] == pytest.approx(4 / 0.6931, rel=1e-3)
    assert facts["clipped_share"] > stability.MAX_CLIPPED
    assert f"{name} (step {stability.CHECK_EVERY + 1}: quantization step changed by 5.8 octaves)" in monitor.summary()
    with caplog.at_level(logging.WARNING):
        for step in range(2 * stability.WINDOW):
            monitor.log(1000 + step, 1.0 + (step >= stability.WINDOW))
    warnings = [record.getMessage() for record in caplog.records if "times the lowest so far" in record.getMessage()]
    assert len(warnings) == 1
    assert name in warnings[0]


def test_the_message_of_a_diverged_step_names_the_first_unstable_quantizers(config, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(QuantizerMonitor, "summary", lambda self: "first unstable quantizers: x")
    real = loop.history_state
    monkeypatch.setattr(loop, "history_state", lambda model, history: real(model, history) * torch.nan)
    with pytest.raises(DivergenceError, match=r"loss is nan at step 1, .*; first unstable quantizers: x"):
        quantize(teacher, tmp_path / "s.pt", config)
    assert not (tmp_path / "s.pt").exists()


def test_a_stage_learns_at_its_own_rate_for_its_own_time(config):
    schedule = stages.schedule_of(Stage(epochs=0.5, learning_rate=3e-4), config.train)
    assert (schedule.epochs, schedule.learning_rate, schedule.warmup_steps) == (0.5, 3e-4, 0)
    assert loop.total_steps(schedule, 8) == 2
