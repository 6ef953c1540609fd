"""Kernels to machine code with NVRTC, which needs no GPU: `python -m plugins.nvrtc --report results/kernels_build.json`.

The report says, for each architecture and each attention of the recipes, what a thread takes of registers and memory.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.variant import THREADS, of_recipe
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.recipes import RECIPES

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--diag-suppress=177")  # 177: a function that this variant has no use for
_FIGURES = {
    "registers": r"Used (\d+) registers",
    "shared_bytes": r"(\d+) bytes smem",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
}
_log = logging.getLogger(__name__)


class CompileError(ValueError):
    """NVRTC is missing, does not know the architecture, or refuses the source."""


@dataclass(frozen=True)
class Usage:
    """What ptxas says that a thread takes; `shared_bytes` is a block's."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


def cubin(source: str, architecture: str) -> bytes:
    """Machine code of `source` for an architecture such as sm_90; kept in `cache_folder` for the next time.

    Raises:
        CompileError: As the class says.
    """
    key = "\0".join((source, architecture, *_OPTIONS, str(_nvrtc_version())))
    kept = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    code, _ = build(source, architecture)
    try:
        with artifact.atomic(kept) as temporary:
            temporary.write_bytes(code)
    except OSError as error:
        _log.warning("the kernel cannot be kept in %s and will be compiled again next time (%s)", kept.parent, error)
    return code


def cache_folder() -> Path:
    """Where this user's compiled kernels lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdbev" / "kernels"


def build(source: str, architecture: str) -> tuple[bytes, Usage]:
    """Compile, and say what the kernel takes.

    Raises:
        CompileError: As the class says.
    """
    nvrtc = _nvrtc()
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"attention.cu", 0, [], []))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *_OPTIONS)]
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.decode().rstrip("\0")
        if int(status) != 0:
            known = ", ".join(f"sm_{number}" for number in _check(nvrtc.nvrtcGetSupportedArchs()))
            raise CompileError(f"NVRTC answers {status.name} for {architecture} (it knows {known}): {text.strip()[:2000]}")
        code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    found = {name: re.search(pattern, text) for name, pattern in _FIGURES.items()}
    return bytes(code), Usage(**{name: int(match[1]) if match else 0 for name, match in found.items()})


def report(recipes: list[str], architectures: list[str]) -> dict[str, Any]:
    """Figures of every attention of the recipes on every architecture."""
    rows = []
    for recipe in recipes:
        for variant in of_recipe(RECIPES[recipe]()):
            for architecture in architectures:
                code, usage = build(variant.source(), architecture)
                row = {"recipe": recipe, **dataclasses.asdict(variant), "architecture": architecture}
                rows.append({**row, **dataclasses.asdict(usage), "cubin_bytes": len(code)})
            _log.info("%s %s %s to %s", recipe, variant.op, variant.value, variant.out)
    spilled = sum(row["spill_store_bytes"] + row["spill_load_bytes"] for row in rows)
    version = ".".join(map(str, _nvrtc_version()))
    return {"threads": THREADS, "nvrtc": version, "spill_bytes": spilled, "rows": rows, "made": artifact.provenance()}


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


def _nvrtc_version() -> tuple[int, int]:
    try:
        return _check(_nvrtc().nvrtcVersion())
    except (ImportError, RuntimeError) as error:  # RuntimeError: the binding is there, the library is not
        raise CompileError(f"NVRTC cannot be loaded ({error}); pip install -r requirements.txt") from error


def _check(result: tuple[Any, ...]) -> Any:
    """Value of a cuda-python call, which returns (status, values...)."""
    status, *values = result
    if int(status) != 0:
        raise CompileError(f"NVRTC answers {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@entry_point
def main() -> None:
    """Compile the recipes' kernels for every architecture and report what they take."""
    parser = argparse.ArgumentParser(prog="python -m plugins.nvrtc", description=main.__doc__)
    parser.add_argument("--report", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    args = parser.parse_args()
    figures = report(args.recipes, args.architectures)
    with artifact.atomic(args.report) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    sys.stdout.write(f"{len(figures['rows'])} kernels, {figures['spill_bytes']} bytes spilled; {args.report}\n")


if __name__ == "__main__":
    main()
