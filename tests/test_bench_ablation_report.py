"""The ablation's table and curves are drawn from the file that the ablation writes."""

import json
from pathlib import Path

import cv2
import pytest
from rich.console import Console

from bench import ablation_report
from eval.nds import EvaluationError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    def scores(*nds: float) -> dict:
        return {"nds": list(nds), "map": [value / 2 for value in nds]}

    float_ = {width: scores(0.4) for width in ablation_report.WIDTHS}
    rows = {
        "float": float_,
        "ptq_mse": {"w8a8": scores(0.4), "w4a6": scores(0.38), "stress": scores(0.2)},
        "vgd": {"w4a6": scores(0.39), "stress": scores(0.30, 0.32, 0.34)},
    }
    before = [{"stage": 1, "epochs": 0.5 * step, "nds": 0.2 + 0.1 * step, "map": 0.1} for step in range(2)]
    last = [{"stage": 5, "epochs": 0.5 + 0.25 * step, "nds": 0.25 + 0.04 * step, "map": 0.1} for step in range(3)]
    content = {
        "stress": "w3a3",
        "epochs": 1.0,
        "stages": [0.125, 0.125, 0.125, 0.125, 0.5],
        "rows": rows,
        "curves": {"vgd": [*before, *last]},
    }
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps(content))
    return path


def shown(path: Path) -> dict[str, list[str]]:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(ablation_report.table(ablation_report.read(path)))
    return {line.split()[0]: line.split()[1:] for line in console.export_text().splitlines() if line.strip()}


def test_the_table_has_mean_spread_recovered_share_and_the_share_of_the_paper(results):
    lines = shown(results)
    assert lines["ptq_mse"] == ["0.400", "0.380", "0.200", "0.100", "0%", "95%"]
    assert lines["vgd"] == ["0.390", "0.320", "±0.020", "0.160", "±0.010", "60%", "98%", "105%"]
    assert lines["float"][:3] == ["0.400"] * 3


def test_the_curves_are_drawn_with_every_row_that_has_some(results, tmp_path):
    ablation_report.save_curves(tmp_path / "with.png", ablation_report.read(results))
    content = ablation_report.read(results)
    content["curves"] = {}
    ablation_report.save_curves(tmp_path / "without.png", content)
    pictures = [cv2.imread(str(tmp_path / f"{name}.png")) for name in ("with", "without")]
    for half in (slice(None, 900), slice(1000, None)):
        violet = [int(((picture[:, half] == (0xE5, 0x5D, 0x9B)).all(-1)).sum()) for picture in pictures]
        assert violet[0] > violet[1] + 300, "the line of view-guided distillation"


@pytest.mark.parametrize("content", ["", "[]", '{"rows": {}}', '{"rows": {"float": {"stress": {"nds": []}}}}'])
def test_a_file_that_holds_no_ablation_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(EvaluationError, match=r"x\.json .*python -m bench\.ablation"):
        ablation_report.read(path)
    with pytest.raises(EvaluationError, match=r"absent\.json"):
        ablation_report.read(tmp_path / "absent.json")
