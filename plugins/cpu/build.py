"""Compiles the CPU kernels of this folder with g++, as a library for PyTorch or as an extension for OpenVINO.

`make setup` does this with `python -m plugins.cpu.install`. A library is kept in build/cpu under a name that depends on the sources, the
compiler and the version of the runtime, so that a change of any of them compiles it anew when it is next used. Headers and libraries to
link come from the Python packages of torch and openvino. Without a compiler, PyTorch code and ONNX function bodies compute the same, more
slowly.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

_log = logging.getLogger(__name__)
Runtime = Literal["torch", "openvino"]
_SOURCES = Path(__file__).parent
_FOLDER = _SOURCES.parents[1] / "build" / "cpu"
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi")
_INSTRUCTION_SETS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"),
}
"""Flags of the compiler for each instruction set for which kernels.cpp is compiled; only `plain` outside x86-64."""
_TIME_LIMIT_S = 600.0


class CompilerError(ValueError):
    """There is no C++ compiler here, or it cannot compile the kernels."""


@functools.cache
def compiled_if_possible(runtime: Runtime) -> Path | None:
    """Return the library for a runtime, compiled if necessary. Without a compiler, say so once and return None."""
    try:
        return compiled(runtime)
    except CompilerError as error:
        _log.warning("%s; the attentions run without a kernel for the CPU, several times more slowly", error)
        return None


def compiled(runtime: Runtime) -> Path:
    """Return the library for a runtime, compiled if necessary. Raises CompilerError if that is not possible."""
    path = _FOLDER / f"qdbev_{runtime}_{_version(runtime)}.so"
    if not path.is_file():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
            _compile(runtime, Path(folder) / "library.so")
            (Path(folder) / "library.so").replace(path)  # whole, also if two processes compile it at the same time
    return path


def source_version() -> str:
    """Return a text that changes with the sources of the kernels. The seal of an engine that calls them contains it."""
    digest = hashlib.sha256()
    for path in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(runtime: Runtime) -> str:
    """Return a text that changes with everything that a library is made from."""
    parts = (source_version(), str(_FLAGS), str(_INSTRUCTION_SETS), platform.machine(), importlib.metadata.version(runtime), _compiler()[1])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _compiler() -> tuple[str, str]:
    """Return the path of g++ and its version. Raises CompilerError if there is none."""
    path = shutil.which("g++")
    if path is None:
        raise CompilerError("g++ was not found; install it (Debian, Ubuntu: apt install g++)")
    return path, _run([path, "-dumpfullversion"]).strip()


def _compile(runtime: Runtime, library: Path) -> None:
    folder, compiler = library.parent, _compiler()[0]
    sets = _INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"plain": ()}
    objects = [folder / f"{name}.o" for name in sets]
    commands = [
        [compiler, *_FLAGS, *flags, f"-DINSTRUCTION_SET={name}", "-c", str(_SOURCES / "kernels.cpp"), "-o", str(made)]
        for (name, flags), made in zip(sets.items(), objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    includes, links = _packages(runtime)
    sources = [str(_SOURCES / "dispatch.cpp"), str(_SOURCES / f"{runtime}.cpp")]
    _run([compiler, *_FLAGS, "-shared", *includes, *sources, *map(str, objects), *links, "-o", str(library)])


def _packages(runtime: Runtime) -> tuple[list[str], list[str]]:
    """Return the flags that find the headers of the runtime's package, and those that link its libraries."""
    root = Path(importlib.util.find_spec(runtime).submodule_search_locations[0])
    if runtime == "torch":
        folder, names = root / "lib", ["libc10.so", "libtorch_cpu.so"]
        flags = ["-fopenmp"]
    else:
        folder = root / "libs"
        names = [next(folder.glob(f"{name}.so.*")).name for name in ("libopenvino", "libopenvino_onnx_frontend", "libtbb")]
        flags = []
    return [*flags, f"-isystem{root / 'include'}"], [f"-L{folder}", *(f"-l:{name}" for name in names), f"-Wl,-rpath,{folder}"]


def _run(command: list[str]) -> str:
    """Run the compiler and return what it prints. Raises CompilerError with its first error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIME_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} failed: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise CompilerError(f"{command[0]} cannot compile the CPU kernels: {lines[0].strip()}")
    return done.stdout
