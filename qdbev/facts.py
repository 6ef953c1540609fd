"""The interface of the deployed graph in a seal."""

from dataclasses import asdict
from typing import Any

from qdbev.artifact import ArtifactError, Seal
from qdbev.config import from_dict
from qdbev.schema import Interface
from qdbev.settings import build


def interface_facts(interface: Interface) -> dict[str, Any]:
    """The interface as JSON values; `interface_of` is the inverse."""
    return {"interface": asdict(interface)}


def interface_of(seal: Seal) -> Interface:
    """The interface of a sealed ONNX file or engine; files of earlier versions do not hold it, so it comes from their config.

    Raises:
        ArtifactError: The seal says neither.
    """
    if "interface" in seal.facts:
        return build(Interface, seal.facts["interface"], "interface.")
    image_hw = seal.facts.get("image_hw") or seal.facts.get("inputs", {}).get("images", ())[-2:]
    if len(image_hw) != 2:
        raise ArtifactError("the seal says neither the interface of the graph nor its image size; export the ONNX again")
    return from_dict(seal.config).model.interface(tuple(image_hw))
