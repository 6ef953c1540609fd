"""Compares the results of the ablation with the paper's: `python -m bench.ablation_report --results FILE --out FOLDER`.

Prints a table and draws the curves of Figure 3 (accuracy over the stages) and Figure 5 (forms of distillation). Our detector and our data
are not the paper's, so both are given as shares of the float teacher's NDS, and time as the share of all epochs. Paper: QD-BEV
(arXiv:2308.10515), Tables 1 and 3, Figures 3 and 5, read with an error of about 0.002 NDS: BEVFormer-Tiny at W4A6 on nuScenes.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from eval.draw import INK, PAPER
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
PAPER_FLOAT_NDS = 0.354
"""NDS of the paper's float teacher."""
_STAGES = ("backbone", "+ neck", "+ encoder", "+ decoder, head", "last stage")
"""Labels of the progressive stages: the groups that are quantized so far."""
_FIGURE_3 = (
    ((0, 0.292), (24, 0.341)),
    ((24, 0.348), (34, 0.348)),
    ((34, 0.322), (50, 0.345)),
    ((50, 0.335), (59, 0.345)),
    ((59, 0.320), (61, 0.348), (65, 0.354), (73, 0.362), (82, 0.362), (84, 0.371)),
)
"""For each stage, points (epoch, NDS) of the paper's Figure 3. The reading error of an epoch is about one: the recipes have 85 in all."""
_FIGURE_5 = {"distill_image": (0.356, 0.359), "distill_bev": (0.349, 0.368), "vgd": (0.346, 0.371)}
"""NDS after the first and the last epoch of distillation in the paper's Figure 5."""
_EPOCHS = 84
"""Epochs of the paper's training."""
_GRAY = "#a6a8b5"
_ROWS = {
    "qat": ("all at once, detection loss", "#8d99ae"),
    "qat_progressive": ("progressive, detection loss", "#2b2d42"),
    "distill_image": ("+ image only", "#ff9f1c"),
    "distill_bev": ("+ BEV only", "#00b4d8"),
    "vgd": ("+ view-guided, the paper's product", "#9b5de5"),
    "vgd_best": ("all at once, our best form from the first step", "#e4572e"),
}
"""Label and colour of each row."""
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
            _share([paper], PAPER_FLOAT_NDS) if paper else "",
        )
    return grid


def save_curves(path: Path, content: dict[str, Any]) -> None:
    """Draw the curves in the results of an ablation into a PNG file."""
    figure = Figure(figsize=(13.0, 5.2), facecolor=PAPER, layout="constrained")
    stages, forms = figure.subplots(1, 2, width_ratios=(1.35, 1.0))
    teacher = content["rows"]["float"]["stress"]["nds"][0]
    _draw_stages(stages, content, teacher)
    _draw_forms(forms, content, teacher)
    stages.legend(frameon=False, fontsize=8.5, loc="lower right")
    forms.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(0.0, 0.75))
    for axes in (stages, forms):
        axes.axhline(100, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylabel("NDS, % of the float teacher's")
        axes.set_facecolor(PAPER)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=130)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ±{statistics.stdev(values):.3f}"


def _share(values: list[float], teacher: float) -> str:
    return f"{statistics.mean(values) / teacher:.0%}"


def _draw_stages(axes: Axes, content: dict[str, Any], teacher: float) -> None:
    """Draw NDS over all stages."""
    lengths, total = content["stages"], content["epochs"]
    for segment in _FIGURE_3:
        label = "the paper's BEVFormer-Tiny, W4A6" if segment is _FIGURE_3[0] else None
        axes.plot(*_scaled(segment, _EPOCHS, PAPER_FLOAT_NDS), color=_GRAY, linewidth=1.2, label=label)
    for name in ("qat", "qat_progressive", "vgd", "vgd_best"):
        points = content["curves"].get(name, [])
        title, color = _ROWS[name]
        for stage in sorted({point["stage"] for point in points}):
            if name == "vgd" and stage < len(lengths):
                continue  # the same as of qat_progressive
            part = [(point["epochs"], point["nds"]) for point in points if point["stage"] == stage]
            label = title if stage == max(point["stage"] for point in points) else None
            axes.plot(*_scaled(part, total, teacher), color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
    end = 0.0
    for length, title in zip(lengths, _STAGES, strict=True):
        axes.axvline(100 * end / total, color=_GRAY, linewidth=0.5)
        middle = 100 * (end + length / 2) / total
        axes.text(middle, 1.01, title, transform=axes.get_xaxis_transform(), ha="center", fontsize=8, color=INK)
        end += length
    axes.set_xlabel(f"% of all epochs ({total:g} of ours at {content['stress'].upper()}, {_EPOCHS} of the paper's)")


def _draw_forms(axes: Axes, content: dict[str, Any], teacher: float) -> None:
    """Draw the last stage alone, one curve for each form of distillation."""
    last = len(content["stages"])
    begin = content["epochs"] - content["stages"][-1]
    for name in ("qat_progressive", "distill_image", "distill_bev", "vgd"):
        points = [point for point in content["curves"].get(name, []) if point["stage"] == last]
        title, color = _ROWS[name]
        part = [(point["epochs"] - begin, point["nds"]) for point in points]
        axes.plot(*_scaled(part, content["stages"][-1], teacher), color=color, linewidth=1.8, marker="o", markersize=3.5, label=title)
        if name in _FIGURE_5:
            first, end = _FIGURE_5[name]
            axes.plot([4, 100], [100 * first / PAPER_FLOAT_NDS, 100 * end / PAPER_FLOAT_NDS], color=color, linewidth=1.0, linestyle=":")
    axes.plot([], [], color=_GRAY, linestyle=":", label="the paper's, W4A6, first and last epoch")
    axes.set_xlabel("% of the last stage")


def _scaled(points: Any, epochs: float, teacher: float) -> tuple[list[float], list[float]]:
    """Points (epoch, NDS) as percent of `epochs` and percent of the teacher's NDS."""
    return [100 * epoch / epochs for epoch, _ in points], [100 * nds / teacher for _, nds in points]


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
        save_curves(temporary, content)
    _log.info("%s", picture)


if __name__ == "__main__":
    main()
