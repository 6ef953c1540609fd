"""The ablation's cells: which there are, what each runs, that they are run once, and how they are collected."""

import json
from pathlib import Path

import pytest

from qdbev.config import from_dict, override, to_dict
from qdbev.quant.prepare import bits_of
from qdbev.recipes import RECIPES, at_bits
from train import ablation
from train.ablation import AblationError, Cell, cells, commands


def settings(command: list[str]) -> list[str]:
    return [value for flag, value in zip(command, command[1:], strict=False) if flag == "--set"]


def config_of(cell: Cell, tmp_path: Path):
    train = next(command for command in commands(cell, tmp_path / "t.pt") if command[0] == "train.qat")
    return from_dict(to_dict(override(at_bits(RECIPES["micro"](), cell.width), settings(train))))


def test_every_row_that_trains_has_equal_epochs_and_settings_that_exist(tmp_path):
    found = list(cells(tmp_path, "w3a3", [], 3))
    for cell in found:
        stages = config_of(cell, tmp_path).quant.stages
        assert sum(stage.epochs for stage in stages) == pytest.approx(ablation.EPOCHS if cell.row.trains else 0)
        assert config_of(cell, tmp_path).seed == cell.seed
    assert len({cell.folder for cell in found}) == len(found)


def test_trained_rows_have_all_seeds_at_the_stress_width_and_one_elsewhere(tmp_path):
    count = {(cell.row.name, cell.width): 0 for cell in cells(tmp_path, "w2a4", [], 3)}
    for cell in cells(tmp_path, "w2a4", [], 3):
        count[cell.row.name, cell.width] += 1
    assert (count["vgd", "w2a4"], count["vgd", "w4a6"], count["ptq_mse", "w2a4"], count["ptq_mse", "w8a8"]) == (3, 1, 1, 1)
    assert count["float_more", "w8a8"] == 3


def test_module_rows_quantize_their_module_alone(tmp_path):
    (cell, _) = cells(tmp_path, "w3a3", ["ptq_decoder"], 3)
    policy = config_of(cell, tmp_path).quant
    assert bits_of("backbone.layer1.0.conv1", policy) is bits_of("encoder.layers.0.ffn.linear1", policy) is None
    assert bits_of("decoder.layers.0.ffn.linear1", policy).weight == bits_of("head.reg_branches.0.0", policy).weight == 4


def test_only_a_mixed_row_measures_sensitivity_first_and_only_once(tmp_path):
    cell = next(cells(tmp_path, "w3a3", ["mixed"], 1))
    assert [command[0] for command in commands(cell, tmp_path / "t.pt")] == ["train.sensitivity", "train.qat", "eval.run"]
    widths = cell.folder.parent / "widths.json"
    widths.parent.mkdir(parents=True)
    widths.touch()
    assert [command[0] for command in commands(cell, tmp_path / "t.pt")] == ["train.qat", "eval.run"]
    assert str(widths) in commands(cell, tmp_path / "t.pt")[0]


def test_a_cell_that_was_interrupted_resumes_and_an_unknown_row_is_refused(tmp_path):
    cell = next(cells(tmp_path, "w3a3", ["qat"], 1))
    assert "--resume" not in commands(cell, tmp_path / "t.pt")[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "student.stage1.state.pt").touch()
    assert "--resume" in commands(cell, tmp_path / "t.pt")[0]
    with pytest.raises(AblationError, match="no rows vdg; there are float_more"):
        list(cells(tmp_path, "w3a3", ["vdg"], 1))


def test_scores_are_collected_over_seeds_under_the_widths_names(tmp_path):
    for row, width, scores in (("qat", "w3a3", (0.3, 0.4)), ("qat", "w4a6", (0.5,)), ("ptq_mse", "w8a8", (0.6,))):
        for seed, nds in enumerate(scores):
            folder = tmp_path / row / width / f"seed{seed}"
            (folder / "eval").mkdir(parents=True)
            (folder / "eval/metrics.json").write_text(json.dumps({"nds": nds, "map": nds / 2}))
            (folder / "seconds.json").write_text("2.5")
    found = ablation.collect(tmp_path, tmp_path / "absent.json", "w3a3")
    assert found["rows"]["qat"] == {"w4a6": {"nds": [0.5], "map": [0.25]}, "stress": {"nds": [0.3, 0.4], "map": [0.15, 0.2]}}
    assert found["rows"]["ptq_mse"] == {"w8a8": {"nds": [0.6], "map": [0.3]}}
    assert found["seconds"] == 10.0


def test_a_failing_command_names_the_cell_and_its_log(tmp_path):
    cell = next(cells(tmp_path / "run", "w3a3", ["qat"], 1))
    with pytest.raises(AblationError, match="python -m train.qat failed in"):
        ablation.run_cell(cell, tmp_path / "absent.pt")
    assert "absent.pt does not exist" in (cell.folder / "log.txt").read_text()
    assert not cell.metrics.exists()
