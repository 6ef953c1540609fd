"""Checks from an engine's seal whether the engine can run here, and gives the command that builds one that can.

An engine runs only under the version of TensorRT that built it, and only on the GPUs it was built for. TensorRT reports a mismatch late and
unclearly, or not at all: on another GPU of the same compute capability the engine is only slow.
"""

import os
import shlex
from pathlib import Path

from engine.backend import Backend, EngineError, Gpu
from engine.cpu import Cpu, kernels_version
from qdbev.artifact import Seal
from qdbev.facts import BuildOptions

_NOT_OF_RTX = ("9.0", "10.0", "10.3")
"""Compute capabilities that TensorRT-RTX (seen in 1.7.1) does not build for."""


def require_gpu(path: Path, seal: Seal, device: Gpu) -> None:
    """Raise EngineError, with the command that builds it again, if the engine is for other GPUs than `device`."""
    target = seal.facts.target
    built_for = target.compute_capabilities
    if built_for is None or (target.gpu in (None, device.name) and device.compute_capability in built_for):
        return
    wanted = f"the {target.gpu} ({', '.join(built_for)})" if target.gpu else f"GPUs of compute capability {', '.join(built_for)}"
    raise EngineError(
        f"{path} was built for {wanted}; this is a {device.name} ({device.compute_capability}). Build it again here:\n"
        f"  {rebuild_command(path, seal, device)}"
    )


def require_cpu(path: Path, seal: Seal, installed: Backend, here: Cpu) -> None:
    """Raise EngineError, with the command that builds it again, if another CPU, OpenVINO or version of the kernels built the engine."""
    target, version = seal.facts.target, seal.facts.backend.version
    if (target.cpu, target.instruction_set) != (here.name, here.instruction_set):
        found = f"was built on another CPU ({target.cpu}, {target.instruction_set}); this is a {here.name} ({here.instruction_set})"
    elif version != installed.version:
        found = f"was built with OpenVINO {version}, installed is {installed.version}"
    elif target.cpu_kernels is not None and target.cpu_kernels != kernels_version():
        found = f"calls CPU kernels of version {target.cpu_kernels}; here they are {kernels_version() or 'missing (no compiler)'}"
    else:
        return
    raise EngineError(f"{path} {found}. Build it again here:\n  {rebuild_command(path, seal)}")


def require_version(path: Path, seal: Seal, installed: Backend, device: Gpu) -> None:
    """Raise EngineError, with the command that builds it again, if another version than the installed one built the engine."""
    built = seal.facts.backend.version
    if built != installed.version:
        raise EngineError(
            f"{path} was built with {installed.name} {built}, installed is {installed.version}, and an engine runs only under the version "
            f"that built it. Build it again here:\n  {rebuild_command(path, seal, device)}\nor install that version: "
            f"pip install {installed.name}=={built}"
        )


def rebuild_command(path: Path, seal: Seal, device: Gpu | None = None) -> str:
    """The command that builds the engine at `path` again with the same options, for `device` and the GPUs it was built for before.

    `device` is None for an engine of a CPU.
    """
    capabilities = seal.facts.target.compute_capabilities
    options = seal.facts.build or BuildOptions(onnx=path.with_suffix(".onnx").name)
    words = ["python", "-m", "engine.build", "--onnx", os.path.normpath(path.parent / options.onnx), "--out", str(path)]
    if device is None:
        words += ["--backend", "cpu"]
    elif seal.facts.backend.name == "tensorrt" or device.compute_capability in _NOT_OF_RTX:
        words += ["--backend", "tensorrt"]
    else:
        words += ["--backend", "tensorrt-rtx"]
        if capabilities is not None:
            words += ["--compute-capability", *sorted({*capabilities, device.compute_capability}, key=float)]
    if options.memory_limit_mb is not None:
        words += ["--memory-limit", str(options.memory_limit_mb)]
    if options.allow_float:
        words.append("--allow-float")
    return shlex.join(words)
