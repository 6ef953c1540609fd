"""Converts configs that earlier versions of this project saved to the present format.

A change that renames, moves or removes a setting must append a function to `MIGRATIONS` that converts a config of the previous format.
"""

import logging
from typing import Any

from qdbev.settings import Migration

_log = logging.getLogger(__name__)
_BEVFORMER_GROUPS = ("backbone", "neck", "encoder", "decoder", "head")
"""Groups of format 1, which knew no other detector."""
_REMOVED_DISTILL = {"axis": "channel", "generalized": True, "image_map": "camera", "foreground": 0.0, "balance": "start"}
"""Settings of distillation that format 2 does not have, each with the value that the code now always uses."""


def _to_format_2(values: dict[str, Any]) -> dict[str, Any]:
    """Convert format 1: add the detector's `kind`, replace the bits of each group by `bits` and `group_bits`, drop removed settings."""
    values["model"] = {"kind": "bevformer", **values.get("model", {})}
    quant = values.get("quant", {})
    given = {group: quant.pop(group) for group in _BEVFORMER_GROUPS if group in quant}
    if given:
        quant["bits"] = given.get("encoder", {})
        quant["group_bits"] = [{"group": group, "bits": bits} for group, bits in given.items() if bits != quant["bits"]]
    quant.setdefault("edge_layers", ("backbone.conv1", "head.cls_branches.*.6", "head.reg_branches.*.4"))
    quant.setdefault("float_layers", ("encoder.can_bus_mlp.*", "decoder.reference_points"))
    if "scale" in quant:
        quant["range_mode"] = quant.pop("scale")
    for stage in quant.get("stages", ()):
        if tuple(stage.get("groups", _BEVFORMER_GROUPS)) == _BEVFORMER_GROUPS:
            stage["groups"] = None
    _drop_removed(quant)
    values["quant"] = quant
    return values


def _drop_removed(quant: dict[str, Any]) -> None:
    """Remove settings and values that no longer exist, and warn about each. Finished models compute the same without them."""
    distill = quant.get("distill", {})
    dropped = {name: distill.pop(name, kept) for name, kept in _REMOVED_DISTILL.items()}
    lost = [f"quant.distill.{name}={value!r}" for name, value in dropped.items() if value != _REMOVED_DISTILL[name]]
    if distill.get("form") == "sum":
        lost.append(f"quant.distill.form={distill.pop('form')!r}")
    if quant.get("calibration") in ("percentile", "entropy"):
        lost.append(f"quant.calibration={quant.pop('calibration')!r}")
    if lost:
        _log.warning("warning: a config of an earlier version has settings that no longer exist and are ignored: %s", ", ".join(lost))


MIGRATIONS: tuple[Migration, ...] = (_to_format_2,)
