"""Options of a build, and a built engine that is not on disk yet, for every backend."""

from dataclasses import dataclass
from pathlib import Path

from engine.backend import BackendName
from engine.layer_table import Layer
from qdbev.facts import Target


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a build; None leaves the choice to the backend."""

    backend: BackendName | None = None
    compute_capabilities: tuple[str, ...] = ()
    """Compute capabilities to build for ahead of time, such as "8.9"; empty builds a portable engine. TensorRT-RTX only."""
    memory_limit_mb: int | None = None
    """Workspace in MB that the engine may use."""
    timing_cache: Path | None = None
    """File of measured kernel times that makes the next build on the same GPU quick, or a folder of such files. TensorRT only."""
    allow_float: bool = False
    """Write the engine even if quantized layers run in float; its seal says so."""


@dataclass(frozen=True)
class Plan:
    """A built engine that is not on disk yet."""

    content: bytes
    table: list[Layer]
    target: Target
    build_seconds: float
