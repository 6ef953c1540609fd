"""Converts seals that earlier versions of this project wrote to the present format.

A change that renames, moves or removes a field of a seal or of its facts must append a function to `MIGRATIONS` that converts a seal of
the previous format to the new one. The config inside a seal has a format of its own (qdbev/config_migrations.py).
"""

from dataclasses import asdict
from typing import Any

from qdbev.config import from_dict
from qdbev.settings import ConfigError, Migration


def _to_format_2(values: dict[str, Any]) -> dict[str, Any]:
    """`made` becomes `provenance`; ONNX files and engines get an interface; facts get one shape for each kind."""
    values["provenance"] = values.pop("made")
    facts = values.get("facts", {})
    if values.get("kind") == "onnx":
        values["facts"] = _onnx_facts(values["config"], facts)
    elif values.get("kind") == "engine":
        values["facts"] = _engine_facts(values["config"], facts)
    return values


def _to_format_3(values: dict[str, Any]) -> dict[str, Any]:
    """The export for TensorRT 8.6 is gone, and with it the fact `builtin_plugin`."""
    if values.get("facts", {}).pop("builtin_plugin", False):
        raise ConfigError("the ONNX was exported with --builtin-plugin, which is no longer supported; export it again without")
    return values


def _interface(config: dict[str, Any], image_hw: Any) -> dict[str, Any]:
    if image_hw is None or len(image_hw) != 2:
        raise ConfigError(f"the seal does not say the image size of the graph (found {image_hw!r}); export the ONNX again")
    return asdict(from_dict(config).model.interface((int(image_hw[0]), int(image_hw[1]))))


def _onnx_facts(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    parity = {name.removeprefix("parity_"): facts.pop(name) for name in list(facts) if name.startswith("parity_")}
    return facts | {"interface": _interface(config, facts.pop("image_hw", None)), "parity": parity}


def _engine_facts(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    images = facts.pop("inputs", {}).get("images", ())
    target = facts.get("target", {})
    if target.get("compute_capabilities") == "portable":
        target["compute_capabilities"] = None
    return facts | {"interface": _interface(config, images[-2:])}


MIGRATIONS: tuple[Migration, ...] = (_to_format_2, _to_format_3)
