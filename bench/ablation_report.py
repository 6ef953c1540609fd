"""Compares the results of the ablation with the paper's: `python -m bench.ablation_report --results FILE --out FOLDER`.

Prints a table and draws the curves. Our detector and our data are not the paper's, so both are given as shares of the float teacher's NDS.
Paper: QD-BEV (arXiv:2308.10515), Tables 1 and 3, Figures 3 and 5: BEVFormer-Tiny at W4A6 on nuScenes.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import draw_ablation
from eval.nds import EvaluationError
from qdbev.artifact import atomic
from qdbev.command import entry_point

WIDTHS = ("w8a8", "w4a6", "stress")
"""Keys of the widths in the results; `stress` is the width at which calibration alone loses much."""
PAPER_NDS = {
    "ptq_backbone": 0.310,
    "ptq_neck": 0.353,
    "ptq_encoder": 0.295,
    "ptq_decoder": 0.353,
    "ptq_max": 0.246,
    "qat_fixed": 0.326,
    "qat_fixed_progressive": 0.348,
    "distill_image": 0.359,
    "distill_bev": 0.368,
    "vgd": 0.372,
}
"""NDS at W4A6 of the rows that the paper has too. The paper does not say how it calibrates; we assume largest values (`ptq_max`)."""
_log = logging.getLogger(__name__)


def read(path: Path) -> dict[str, Any]:
    """Read a file that `python -m bench.ablation` wrote.

    Raises:
        EvaluationError: The file is missing, damaged, or has no score of the float teacher.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        content["rows"]["float"]["stress"]["nds"][0]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise EvaluationError(f"{path} holds no results of an ablation ({error!r}); make it with `python -m bench.ablation`") from error
    return content


def table(content: dict[str, Any]) -> Table:
    """A table for the terminal: NDS of every row at every width, mean and standard deviation over seeds, and mAP at the stress width.

    `recovered` is the recovered share of the NDS that calibration alone loses at the stress width. The last two columns are our NDS and
    the paper's at W4A6, each as a share of its float teacher's.
    """
    rows = content["rows"]
    teacher = rows["float"]["stress"]["nds"][0]
    calibrated = rows.get("ptq_mse", {}).get("stress", {"nds": [teacher]})["nds"][0]
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    grid.add_column("row", no_wrap=True)
    for title in ("W8A8", "W4A6", content["stress"].upper(), "mAP", "recovered", "W4A6 / float", "paper's"):
        grid.add_column(title, justify="right")
    for name, row in rows.items():
        stress = row.get("stress")
        paper = PAPER_NDS.get(name)
        grid.add_row(
            name,
            *(_spread(row[width]["nds"]) if width in row else "" for width in WIDTHS),
            _spread(stress["map"]) if stress else "",
            _share([nds - calibrated for nds in stress["nds"]], teacher - calibrated) if stress and teacher > calibrated else "",
            _share(row["w4a6"]["nds"], teacher) if "w4a6" in row else "",
            _share([paper], draw_ablation.PAPER_FLOAT_NDS) if paper else "",
        )
    return grid


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ±{statistics.stdev(values):.3f}"


def _share(values: list[float], teacher: float) -> str:
    return f"{statistics.mean(values) / teacher:.0%}"


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Print the table of the ablation and draw its curves."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablation_report", description=main.__doc__)
    parser.add_argument("--results", type=Path, required=True, help="file that `python -m bench.ablation` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for curves.png")
    args = parser.parse_args(argv)
    content = read(args.results)
    Console(width=120).print(table(content))
    picture = args.out / "curves.png"
    with atomic(picture) as temporary:
        draw_ablation.save(temporary, content)
    _log.info("%s", picture)


if __name__ == "__main__":
    main()
