"""The ablation runs every cell once with the right settings, and collects their scores."""

import json
from pathlib import Path

import pytest

from bench import ablation, ablation_rows
from bench.ablation import AblationError, Cell, cells, commands, search_cells
from qdbev.config import from_dict, override, to_dict
from qdbev.quant.prepare import bits_of
from qdbev.recipes import RECIPES, at_bits


def settings(command: list[str]) -> list[str]:
    return [value for flag, value in zip(command, command[1:], strict=False) if flag == "--set"]


def trainings(cell: Cell, tmp_path: Path) -> list[list[str]]:
    """Return the training commands of a cell and of the cell that it continues."""
    found = [command for part in (cell.start, cell) if part is not None for command in commands(part, tmp_path / "t.pt")]
    return [command for command in found if command[0] == "train.qat"]


def config_of(cell: Cell, tmp_path: Path, which: int = -1):
    return from_dict(to_dict(override(at_bits(RECIPES["micro"](), cell.width), settings(trainings(cell, tmp_path)[which]))))


def test_every_row_that_trains_has_equal_epochs_and_settings_that_exist(tmp_path):
    found = list(cells(tmp_path, "w3a3", [], 3))
    for cell in [*found, *search_cells(tmp_path, "w3a3")]:
        configs = [config_of(cell, tmp_path, which) for which in range(len(trainings(cell, tmp_path)))]
        epochs = sum(stage.epochs for config in configs for stage in config.quant.stages)
        wanted = ablation_rows.LONGER if cell.row.longer else ablation_rows.EPOCHS if cell.row.stages else 0
        assert epochs == pytest.approx(wanted)
        assert {config.seed for config in configs} == {cell.seed}
        rates = {stage.learning_rate for config in configs for stage in config.quant.stages}
        assert rates == ({ablation_rows.FINE_RATE if cell.width == "w4a6" else ablation_rows.RATE} if cell.row.stages else set())
        assert len({(config.quant.range_mode, config.quant.calibration) for config in configs}) == 1, "a row and its start have one policy"
    assert len({cell.folder for cell in found}) == len(found)


def test_trained_rows_have_all_seeds_at_the_stress_width_and_one_elsewhere(tmp_path):
    count = {(cell.row.name, cell.width): 0 for cell in cells(tmp_path, "w2a4", [], 3)}
    for cell in cells(tmp_path, "w2a4", [], 3):
        count[cell.row.name, cell.width] += 1
    assert (count["vgd", "w2a4"], count["vgd", "w4a6"], count["ptq_mse", "w2a4"], count["ptq_mse", "w8a8"]) == (3, 1, 1, 1)
    assert count["float_more", "w8a8"] == 3
    longer = {(cell.row.name, cell.width, cell.seed) for cell in cells(tmp_path, "w2a4", [], 3) if cell.row.longer}
    assert longer == {("qat_longer", "w2a4", 0), ("vgd_best_longer", "w2a4", 0)}


def test_module_rows_quantize_their_module_alone(tmp_path):
    (cell, _) = cells(tmp_path, "w3a3", ["ptq_decoder"], 3)
    policy = config_of(cell, tmp_path).quant
    assert bits_of("backbone.layer1.0.conv1", policy) is bits_of("encoder.layers.0.ffn.linear1", policy) is None
    assert bits_of("decoder.layers.0.ffn.linear1", policy).weight == bits_of("head.reg_branches.0.0", policy).weight == 4


def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace running a command by recording it and writing its output files; returns the list of recorded commands."""
    done = []

    def execute(command: list[str], log: Path, threads: int) -> None:
        done.append(command)
        out = Path(command[command.index(next(flag for flag in ("--out", "--student") if flag in command)) + 1])
        made = out / "metrics.json" if command[0] == "eval.run" else out
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps({"nds": 0.5, "map": 0.25}))

    monkeypatch.setattr(ablation, "_execute", execute)
    return done


def test_sensitivity_is_measured_first_and_once_for_all_mixed_rows_of_a_width(tmp_path, monkeypatch):
    done = executed(monkeypatch)
    todo = list(cells(tmp_path, "w3a3", ["qat", "mixed", "ptq_mixed"], 2))
    ablation.run_all(todo, tmp_path / "t.pt", 1, lambda cell: None)
    measured = [command for command in done if command[0] == "train.sensitivity"]
    assert done[:2] == measured
    assert sorted(command[command.index("--bits") + 1] for command in measured) == ["w3a3", "w4a6"]
    assert "--measured" not in measured[0]
    assert measured[1][measured[1].index("--measured") + 1] == measured[0][measured[0].index("--out") + 1]
    mixed = {command[command.index("--widths") + 1] for command in done if "--widths" in command}
    assert mixed == {command[command.index("--out") + 1] for command in measured}
    assert sum("--widths" in command for command in done) == 5


def test_rows_continue_from_the_progressive_student_of_their_width_and_seed(tmp_path, monkeypatch):
    done = executed(monkeypatch)
    finished = []
    todo = list(cells(tmp_path, "w3a3", ["qat_progressive", "vgd", "qat_fixed_progressive"], 2))
    ablation.run_all(todo, tmp_path / "t.pt", 2, lambda cell: finished.append(cell.folder))
    assert sorted(finished) == sorted(cell.folder for cell in todo)
    made = [command[command.index("--student") + 1] for command in done if "--student" in command]
    assert len(made) == len(set(made)) == len(todo) + 6, "six starts: two scales for W4A6 and two seeds of the stress width"
    for command in done:
        if "--start" in command:
            student, start = (Path(command[command.index(flag) + 1]) for flag in ("--student", "--start"))
            assert start.parts[-3:] == student.parts[-3:]
            assert start.parts[-4] == ("progressive_fixed" if "fixed" in student.parts[-4] else "progressive")


def test_intermediate_students_are_kept_and_evaluated_for_the_first_seed_at_the_stress_width(tmp_path, monkeypatch):
    done = executed(monkeypatch)
    todo = list(cells(tmp_path, "w3a3", ["vgd"], 2))
    for cell in todo:
        for part in (cell, cell.start):
            part.folder.mkdir(parents=True)
            (part.folder / "student.stage1.step0.pt").touch()
    ablation.run_all(todo, tmp_path / "t.pt", 1, lambda cell: None)
    kept = [Path(command[command.index("--student") + 1]) for command in done if "--keep-every" in command]
    assert [path.parts[-4:-1] for path in kept] == [("progressive", "w3a3", "seed0"), ("vgd", "w3a3", "seed0")]
    on_the_way = [Path(command[2]) for command in done if command[0] == "eval.run" and "step0" in command[2]]
    assert [path.parts[-4:-1] for path in on_the_way] == [("progressive", "w3a3", "seed0"), ("vgd", "w3a3", "seed0")]
    before = len(done)
    ablation.run_all(todo[1:2], tmp_path / "t.pt", 1, lambda cell: None)
    assert [command[0] for command in done[before:]] == ["eval.run"], "what was done is not done again"


def test_a_cell_that_was_interrupted_resumes_and_an_unknown_row_is_refused(tmp_path):
    cell = next(cells(tmp_path, "w3a3", ["qat"], 1))
    assert "--resume" not in commands(cell, tmp_path / "t.pt")[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "student.stage1.state.pt").touch()
    assert "--resume" in commands(cell, tmp_path / "t.pt")[0]
    with pytest.raises(AblationError, match="vdg.*float_more"):
        list(cells(tmp_path, "w3a3", ["vdg"], 1))


def test_scores_are_collected_over_seeds_under_the_widths_names(tmp_path):
    for row, width, scores in (
        ("qat", "w3a3", (0.3, 0.4)),
        ("qat", "w4a6", (0.5,)),
        ("ptq_mse", "w8a8", (0.6,)),
        ("float_more", "w8a8", (0.8,)),
    ):
        for seed, nds in enumerate(scores):
            folder = tmp_path / row / width / f"seed{seed}"
            (folder / "eval").mkdir(parents=True)
            (folder / "eval/metrics.json").write_text(json.dumps({"nds": nds, "map": nds / 2}))
            (folder / "seconds.json").write_text("2.5")
    (tmp_path / "float").mkdir()
    (tmp_path / "float/metrics.json").write_text(json.dumps({"nds": 0.7, "map": 0.6}))
    found = ablation.collect(tmp_path, tmp_path / "float/metrics.json", "w3a3")
    assert all(found["rows"]["float"][width] == {"nds": [0.7], "map": [0.6]} for width in ("w8a8", "w4a6", "stress"))
    assert found["rows"]["qat"] == {"w4a6": {"nds": [0.5], "map": [0.25]}, "stress": {"nds": [0.3, 0.4], "map": [0.15, 0.2]}}
    assert found["rows"]["ptq_mse"] == {"w8a8": {"nds": [0.6], "map": [0.3]}}
    assert all(found["rows"]["float_more"][width] == {"nds": [0.8], "map": [0.4]} for width in ("w8a8", "w4a6", "stress"))
    assert found["seconds"] == 12.5


def test_a_failing_command_names_the_cell_and_its_log(tmp_path):
    cell = next(cells(tmp_path / "run", "w3a3", ["qat"], 1))
    with pytest.raises(AblationError, match=r"train\.qat .*log\.txt"):
        ablation.run_cell(cell, tmp_path / "absent.pt", threads=1)
    assert "absent.pt" in (cell.folder / "log.txt").read_text()
    assert not cell.metrics.exists()
