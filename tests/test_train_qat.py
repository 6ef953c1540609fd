"""From a float teacher to a sealed student: calibration on frames run as in deployment, training on, restoring."""

import json
from pathlib import Path

import pytest
import torch
from small_networks import settings
from small_trainings import CPU, interrupted_after, quantize

from qdbev import artifact, detectors
from qdbev.artifact import ArtifactError
from qdbev.config import Config, from_dict, override
from qdbev.detector import Deployed, Detector, run_stream
from qdbev.frames import open_frames
from qdbev.quant.pack import round_floats_to_half
from qdbev.recipes import RECIPES, at_bits
from qdbev.restore import restore
from train import calibration
from train import teacher as float_training
from train.distributed import World


@pytest.fixture(scope="module")
def teacher(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = override(RECIPES["micro"](), settings(data__root=str(tiny_world), quant__stages="[{'epochs': 1.0}]"))
    return float_training.train(config, tmp_path_factory.mktemp("teacher"), CPU, World(), resume=False)


def config_of(teacher: Path, bits: str, *settings: str) -> Config:
    return override(at_bits(from_dict(artifact.load_checkpoint(teacher, "teacher")[0].config), bits), list(settings))


def outputs(model: Detector, config: Config) -> torch.Tensor:
    """Return (2, Q, 10) box codes of the first two frames of the validation split."""
    frames = open_frames(config, "val")
    with torch.no_grad():
        steps = list(run_stream(detectors.stream(config.model), Deployed(model).run, (frames.frame(index) for index in range(2))))
    return torch.cat([torch.from_numpy(step.outputs["box_code"]) for step in steps])


def test_calibration_alone_gives_a_student_that_its_file_gives_back(teacher, tmp_path):
    config = config_of(teacher, "w8a8", "quant.stages=()")
    frames = open_frames(config, "train", training=True)
    student = calibration.calibrated_student(restore(teacher)[1], config, frames, CPU)
    round_floats_to_half(student)
    quantize(teacher, tmp_path / "w8a8.pt", config)
    seal, restored = restore(tmp_path / "w8a8.pt")
    assert seal.kind == "student"
    assert seal.parent == artifact.sha256(teacher)
    torch.testing.assert_close(outputs(restored, config), outputs(student, config), atol=0, rtol=0)
    plain = outputs(restore(teacher)[1], config)
    assert 0 < (outputs(restored, config) - plain).abs().max() < 1.0


def test_calibration_runs_first_and_later_frames(teacher):
    config = config_of(teacher, "w8a8")
    frames = open_frames(config, "train", training=True)
    model = restore(teacher)[1]
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(bool(args[5])))
    calibration.run_sequences(model, config, calibration.frame_pairs(frames, 4))
    assert seen == [False, True, False, True]


def test_a_four_bit_student_is_smaller_and_its_file_counts_both_ways(teacher, tmp_path):
    sizes = {}
    for bits in ("w8a8", "w4a6"):
        path = tmp_path / f"{bits}.pt"
        quantize(teacher, path, config_of(teacher, bits, "quant.stages=()"))
        sizes[bits] = artifact.load_checkpoint(path, "student")[0].facts
    assert sizes["w4a6"].packed_bytes < sizes["w8a8"].packed_bytes
    assert sizes["w4a6"].paper_bytes == sizes["w8a8"].paper_bytes / 2


def test_quantization_aware_training_moves_weights_and_steps_and_resumes_bit_for_bit(teacher, tmp_path):
    config = config_of(teacher, "w4a6")
    quantize(teacher, tmp_path / "whole.pt", config)
    start = calibration.calibrated_student(restore(teacher)[1], config, open_frames(config, "train", training=True), CPU).state_dict()
    whole = artifact.load_checkpoint(tmp_path / "whole.pt", "student")[1]
    moved = [name for name in whole if not torch.equal(whole[name], start[name])]
    assert any(name.endswith("log_step") for name in moved)
    assert "backbone.conv1.weight" in moved

    with interrupted_after(2):
        quantize(teacher, tmp_path / "parts.pt", config)
    quantize(teacher, tmp_path / "parts.pt", config, resume=True)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / f"{name}.stage1.log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_a_student_is_no_teacher(teacher, tmp_path):
    quantize(teacher, tmp_path / "w8a8.pt", config_of(teacher, "w8a8", "quant.stages=()"))
    with pytest.raises(ArtifactError, match="is a student file, a teacher is needed"):
        artifact.load_checkpoint(tmp_path / "w8a8.pt", "teacher")


def test_weights_that_do_not_fit_their_own_config_are_refused(teacher, tmp_path):
    seal, weights, _ = artifact.load_checkpoint(teacher, "teacher")
    weights.pop("encoder.camera_embed")
    artifact.save_checkpoint(tmp_path / "bad.pt", config=seal.config, weights=weights, parent=None, facts=seal.facts)
    with pytest.raises(ArtifactError, match="weights do not fit the checkpoint's own config"):
        restore(tmp_path / "bad.pt")
