"""Facts for seals that tests make themselves."""

from typing import Any

from qdbev.facts import BackendVersion, EngineFacts, OnnxFacts, Target
from qdbev.schema import Interface

NO_TENSORS = Interface(inputs={}, outputs={})


def onnx_facts(interface: Interface = NO_TENSORS) -> OnnxFacts:
    """Facts of an ONNX file with that interface."""
    return OnnxFacts(interface=interface, bytes=1)


def engine_facts(
    interface: Interface = NO_TENSORS,
    backend: tuple[str, str] = ("tensorrt-rtx", "1.7.1"),
    capabilities: tuple[str, ...] | None = ("8.9",),
    gpu: str | None = None,
    **changes: Any,
) -> EngineFacts:
    """Facts of an engine; `backend` is name and version."""
    values: dict[str, Any] = {"plan_bytes": 4, "layer_table_sha256": "0" * 64, **changes}
    target = Target(compute_capabilities=capabilities, gpu=gpu)
    return EngineFacts(interface=interface, backend=BackendVersion(name=backend[0], version=backend[1]), target=target, **values)
