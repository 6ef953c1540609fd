"""Draws the curves of the ablation: accuracy over the stages (paper's Figure 3), and forms of distillation side by side (Figure 5).

Accuracy is NDS as a share of the float teacher's, and time is the share of all epochs, so that the paper's curves fit the same axes.
Source of the paper's curves: QD-BEV (arXiv:2308.10515), Figures 3 and 5, read from the pictures with an error of about 0.002 NDS.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.draw import INK, PAPER

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
"""For each stage, points (epoch, NDS) of the paper's Figure 3."""
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


def save(path: Path, content: dict[str, Any]) -> None:
    """Draw the curves in the results of an ablation into a PNG file."""
    figure = Figure(figsize=(13.0, 5.2), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
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


def _draw_stages(axes: Axes, content: dict[str, Any], teacher: float) -> None:
    """Draw NDS over all stages; a stage starts lower where the quantization of the next group costs accuracy."""
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
