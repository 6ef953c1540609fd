"""The rows of the ablation: those of QD-BEV's Tables 1 and 3 and Figures 3 and 5 (arXiv:2308.10515), and rows that we compare them with.

All rows that train have the same number of epochs in total, except the longer ones.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.recipes import POLICY, progressive
from qdbev.quant.config import Stage

RATE, FINE_RATE = 1e-3, 3e-4
"""Learning rates of rows that train: RATE, and FINE_RATE at W4A6, where calibration alone loses little (see docs/distillation.md)."""
BEFORE = (0.15, 0.075, 0.15, 0.075)
"""Epochs of the progressive stages before the last one."""
LAST = 0.3
"""Epochs of the last stage."""
EPOCHS = sum(BEFORE) + LAST
"""Epochs of all stages together."""
LONGER = 3 * EPOCHS
"""Epochs of the rows that show the effect of a longer training."""


@dataclass(frozen=True)
class AblationRow:
    """One row of the ablation."""

    name: str
    stages: tuple[Stage, ...] = ()
    """Stages of the training; their learning rate is replaced by that of the width. Without stages the row only calibrates."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of `train.qat` by dotted name."""
    mixed: bool = False
    """Use a width for each layer that bit allocation has chosen."""
    start: str | None = None
    """Name of the progressive row in `STARTS` whose student the training continues from."""
    curve: bool = False
    """Keep students during the training and evaluate them."""
    longer: bool = False
    """Train for LONGER epochs, only at the stress width and with one seed."""


def _distilling(name: str, form: str, weight: float, temperature: float) -> AblationRow:
    """A row that distils in the last stage only, as in the paper."""
    settings = _distill(form=form, weight=weight, temperature=temperature)
    return AblationRow(name, (Stage(epochs=LAST, distill=True),), settings, start="progressive", curve=True)


def _distilling_throughout(name: str, form: str, head: float) -> AblationRow:
    """A row that quantizes everything and distils from the first step on."""
    return AblationRow(name, (Stage(epochs=EPOCHS, distill=True),), _distill(form=form, weight=2.0, head=head), curve=True)


def _longer(row: AblationRow) -> AblationRow:
    """A row of one stage with a longer training."""
    stages = tuple(dataclasses.replace(stage, epochs=LONGER) for stage in row.stages)
    return dataclasses.replace(row, name=f"{row.name}_longer", stages=stages, curve=False, longer=True)


def _quant(**settings: Any) -> dict[str, Any]:
    return {f"quant.{name}": value for name, value in settings.items()}


def _distill(**settings: float | str) -> dict[str, Any]:
    return {f"quant.distill.{name}": value for name, value in settings.items()}


def _alone(*groups: str) -> dict[str, Any]:
    """Settings with which only `groups` are quantized."""
    return _quant(float_layers=[*POLICY.float_layers, *(f"{group}.*" for group in BEVFormerConfig.groups if group not in groups)])


_PROGRESSIVE = progressive(BEFORE, RATE)
_STANDARD, _LAST = (Stage(epochs=EPOCHS),), (Stage(epochs=LAST),)
_FIXED = _quant(range_mode="fixed")
STARTS = {
    "progressive": AblationRow("progressive", _PROGRESSIVE),
    "progressive_fixed": AblationRow("progressive_fixed", _PROGRESSIVE, _FIXED),
}
"""Progressive rows whose students other rows continue from."""

_QAT = AblationRow("qat", _STANDARD, curve=True)
_BEST = _distilling_throughout("vgd_best", "guided", head=1.0)
ROWS = (
    AblationRow("float_more", (Stage(groups=(), epochs=EPOCHS),)),
    AblationRow("ptq_max_tensor", settings=_quant(calibration="max", per_channel=False)),
    AblationRow("ptq_max", settings=_quant(calibration="max")),
    AblationRow("ptq_mse"),
    AblationRow("ptq_backbone", settings=_alone("backbone")),
    AblationRow("ptq_neck", settings=_alone("neck")),
    AblationRow("ptq_encoder", settings=_alone("encoder")),
    AblationRow("ptq_decoder", settings=_alone("decoder", "head")),  # the paper's Table 1 counts the head with the decoder
    AblationRow("ptq_mixed", mixed=True),
    AblationRow("qat_fixed", _STANDARD, _FIXED),
    AblationRow("qat_fixed_progressive", _LAST, _FIXED, start="progressive_fixed"),
    _QAT,
    AblationRow("qat_progressive", _LAST, start="progressive", curve=True),
    _distilling("distill_image", "image", weight=4.0, temperature=4.0),
    _distilling("distill_bev", "bev", weight=4.0, temperature=4.0),
    _distilling("vgd", "product", weight=4.0, temperature=1.0),
    _BEST,
    AblationRow("mixed", _STANDARD, mixed=True),
    _longer(_QAT),
    _longer(_BEST),
)

SEARCH = (
    *(
        _distilling(f"{name}_w{weight:g}_t{temperature:g}", form, weight=weight, temperature=temperature)
        for name, form in (("distill_image", "image"), ("distill_bev", "bev"), ("vgd", "product"))
        for weight, temperature in ((1.0, 1.0), (4.0, 1.0), (4.0, 4.0))
    ),
    _distilling_throughout("whole_guided_w2_h1", "guided", head=1.0),
    _distilling_throughout("whole_guided_w2_h4", "guided", head=4.0),
    _distilling_throughout("whole_bev_w2_h1", "bev", head=1.0),
)
"""Weights and temperatures with which each form of distillation was tried."""
