"""Compile CUDA C++ to GPU machine code with NVRTC. This needs no GPU. Compiled kernels are cached on disk."""

import functools
import hashlib
import logging
import os
import re
from pathlib import Path

from qdbev import artifact
from qdbev.cuda_check import check

_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--diag-suppress=177")  # 177: a function that this kernel does not use
FIGURES = {
    "registers": r"Used (\d+) registers",
    "shared_bytes": r"(\d+) bytes smem",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
}
"""Patterns in the log of ptxas of the resources that `build` reports: per thread, except `shared_bytes`, which is per block."""
_log = logging.getLogger(__name__)


class CompileError(ValueError):
    """NVRTC is not installed, does not know the architecture, or rejects the source."""


_check = functools.partial(check, error=CompileError)


def cubin(source: str, architecture: str) -> bytes:
    """Return the machine code of `source` for an architecture such as sm_90, from the cache if it was compiled before.

    Raises:
        CompileError: NVRTC is not installed, does not know the architecture, or rejects the source.
    """
    key = "\0".join((source, architecture, *_OPTIONS, str(version())))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = caches / "qdbev" / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    if cached.is_file():
        return cached.read_bytes()
    code, _ = build(source, architecture)
    try:
        with artifact.atomic(cached) as temporary:
            temporary.write_bytes(code)
    except OSError as error:
        _log.warning("the compiled kernel cannot be stored in %s and will be compiled again next time (%s)", cached.parent, error)
    return code


def build(source: str, architecture: str) -> tuple[bytes, dict[str, int]]:
    """Compile `source` and return its machine code and its resources, by their names in `FIGURES`; does not use the cache.

    Raises CompileError as `cubin` does.
    """
    version()  # raises if NVRTC is missing
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *_OPTIONS)]
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode().rstrip("\0")
        if int(status) != 0:
            known = ", ".join(f"sm_{number}" for number in _check(nvrtc.nvrtcGetSupportedArchs()))
            raise CompileError(f"NVRTC returned {status.name} for {architecture} (it supports {known}): {text.strip()[:2000]}")
        code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    found = {name: re.search(pattern, text) for name, pattern in FIGURES.items()}
    return bytes(code), {name: int(match[1]) if match else 0 for name, match in found.items()}


def version() -> tuple[int, int]:
    """Return the major and minor version of NVRTC. Raises CompileError if NVRTC is not installed."""
    try:
        from cuda.bindings import nvrtc

        return _check(nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError) as error:  # RuntimeError: the Python binding is installed, but not the library
        raise CompileError(f"NVRTC cannot be loaded ({error}); pip install -r requirements.txt") from error
