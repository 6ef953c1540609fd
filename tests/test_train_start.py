"""Training that starts from another student, and the students that are kept during a training."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_networks import settings
from small_trainings import quantize, untrained_teacher

from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.config import Config, override
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.recipes import progressive
from qdbev.quant.config import Stage
from qdbev.quant.layers import quant_layers, quantizers
from qdbev.recipes import RECIPES, at_bits
from qdbev.restore import restore
from train import loop

BEFORE = progressive((0.25, 0.25, 0.25, 0.25), 1e-3)
LAST = Stage(epochs=0.5, learning_rate=1e-3, distill=True)


def staged(config: Config, *stages: Stage) -> Config:
    return dataclasses.replace(config, quant=dataclasses.replace(config.quant, stages=stages))


@pytest.fixture
def config(tiny_world: Path) -> Config:
    return at_bits(override(RECIPES["micro"](), settings(data__root=str(tiny_world))), "w4a6")


@pytest.fixture
def teacher(config: Config, tmp_path: Path) -> Path:
    return untrained_teacher(config, tmp_path / "teacher.pt")


def test_a_student_that_starts_from_another_sees_the_samples_that_come_next(config, teacher, tmp_path, monkeypatch):
    seen = []
    real = loop.train_step

    def watched(learner, history, current, run, step):
        seen.append(current.tokens)
        return real(learner, history, current, run, step)

    monkeypatch.setattr(loop, "train_step", watched)
    quantize(teacher, tmp_path / "whole.pt", staged(config, *BEFORE, LAST))
    whole, seen[:] = list(seen), []
    quantize(teacher, tmp_path / "start.pt", staged(config, *BEFORE))
    quantize(teacher, tmp_path / "rest.pt", staged(config, LAST), start=tmp_path / "start.pt")
    assert seen == whole
    facts = [artifact.load_checkpoint(tmp_path / f"{name}.pt", "student")[0].facts for name in ("whole", "rest")]
    assert facts[0].steps == facts[1].steps == 6
    assert facts[1].final_loss == pytest.approx(facts[0].final_loss, rel=0.02)  # the start's biases were rounded to float16


def test_a_start_of_another_teacher_another_policy_or_another_kind_is_refused(config, teacher, tmp_path):
    plain = staged(config)
    quantize(teacher, tmp_path / "start.pt", plain)
    wide = dataclasses.replace(plain, quant=dataclasses.replace(plain.quant, range_mode="clip", per_channel=False))
    with pytest.raises(ArtifactError, match=r"start.pt has another policy \(differs in quant.range_mode, quant.per_channel\)"):
        quantize(teacher, tmp_path / "s.pt", wide, start=tmp_path / "start.pt")
    other = untrained_teacher(dataclasses.replace(config, seed=1), tmp_path / "other.pt")
    with pytest.raises(ArtifactError, match="start.pt was made from .* not from .*other.pt"):
        quantize(other, tmp_path / "s.pt", plain, start=tmp_path / "start.pt")
    with pytest.raises(ArtifactError, match="teacher.pt is a teacher file, a student is needed here"):
        quantize(teacher, tmp_path / "s.pt", plain, start=teacher)
    assert not (tmp_path / "s.pt").exists()


def test_students_on_the_way_are_kept_at_both_ends_of_a_stage_and_in_between_with_what_was_quantized_then(config, teacher, tmp_path):
    two = Stage(groups=BEVFormerConfig.groups[:2], epochs=0.75, learning_rate=1e-3)
    quantize(teacher, tmp_path / "s.pt", staged(config, BEFORE[0], two), keep_every=0.5)
    kept = {path.name: artifact.load_checkpoint(path, "student")[0].facts for path in tmp_path.glob("s.stage*.step*.pt")}
    assert {name: facts.epochs for name, facts in kept.items()} == {
        "s.stage1.step0.pt": 0.0,
        "s.stage1.step1.pt": 0.25,
        "s.stage2.step0.pt": 0.25,
        "s.stage2.step2.pt": 0.75,
        "s.stage2.step3.pt": 1.0,
    }
    for name, groups in (("s.stage1.step1.pt", BEVFormerConfig.groups[:1]), ("s.stage2.step0.pt", BEVFormerConfig.groups[:2])):
        layers = quant_layers(restore(tmp_path / name)[1])
        assert {layer.partition(".")[0] for layer, module in layers if all(q.enabled for q in quantizers(module))} == set(groups)
    ends = [artifact.load_checkpoint(tmp_path / name, "student")[1] for name in ("s.stage1.step1.pt", "s.stage2.step0.pt")]
    weights = [name for name in ends[0] if name.endswith("conv1.weight")]
    assert weights
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in weights)
