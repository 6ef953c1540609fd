"""The CPU of this machine, and OpenVINO with the custom operators.

OpenVINO computes the custom operators with the kernels of plugins/cpu, an extension, if there is a compiler to build it. Without it,
OpenVINO reads graphs in which the function bodies are written out.
"""

import functools
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.backend import Backend
from plugins.cpu import build as cpu_kernels
from qdbev.facts import Target

_INSTRUCTION_SETS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "sse4_1")
"""Instruction sets of x86 CPUs as Linux names them, the widest for integer products first."""
EXACT, SATURATING = _INSTRUCTION_SETS[:3], _INSTRUCTION_SETS[3:]
"""Those that add products of 8-bit numbers in 32 bits, and those that add pairs of them in 16 bits, which saturates (guide of oneDNN)."""


@dataclass(frozen=True)
class Cpu:
    """The model of a CPU, and the widest of `_INSTRUCTION_SETS` that it has (elsewhere the machine's name, such as aarch64)."""

    name: str
    instruction_set: str


@functools.cache
def this_cpu() -> Cpu:
    """The CPU of this machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(tuple(part.strip() for part in line.split(":", 1)) for line in reversed(info.splitlines()) if ":" in line)
    flags = fields.get("flags", "").split()
    found = next((name for name in _INSTRUCTION_SETS if name in flags), platform.machine())
    return Cpu(name=fields.get("model name") or platform.processor() or "unknown CPU", instruction_set=found)


def kernels_version() -> str | None:
    """Version of the kernels that `core` would use here; None without a compiler."""
    return cpu_kernels.source_version() if cpu_kernels.compiled_if_possible("openvino") else None


def core(chosen: Backend, with_kernels: bool) -> Any:
    """OpenVINO's core, with the kernels of plugins/cpu as an extension if asked for."""
    found = chosen.module.Core()
    if with_kernels:
        found.add_extension(str(cpu_kernels.compiled_if_possible("openvino")))
    return found


class Running:
    """A compiled model that runs: outputs by name from inputs by name. `threads` is their number, None for all cores."""

    def __init__(self, chosen: Backend, content: bytes, target: Target, threads: int | None) -> None:
        """Open the content of an engine file. Raises RuntimeError, with OpenVINO's reason, if it cannot be opened."""
        settings = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self.compiled = core(chosen, target.cpu_kernels is not None).import_model(content, "CPU", settings)
        self._request = self.compiled.create_infer_request()
        self._outputs = {port.any_name: port for port in self.compiled.outputs}

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._request.infer(inputs, share_inputs=True)
        return {name: self._request.get_tensor(port).data.copy() for name, port in self._outputs.items()}
