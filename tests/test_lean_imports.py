"""Importing a module of this project imports no CUDA or TensorRT package and does not initialise CUDA."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("qdbev", "train", "export", "plugins", "engine", "eval", "bench", "synthetic")

HEAVY = ("cuda", "tensorrt", "tensorrt_bindings", "tensorrt_libs", "tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs", "pycuda")
"""Packages that load the CUDA driver, NVRTC or TensorRT. Only functions may import them, when they are called."""

REPORT = """
import importlib, sys, torch

def heavy():
    return {name for name in sys.modules if name.partition(".")[0] in sys.argv[1].split(",")}

for name in heavy():  # PyTorch imports cuda.bindings itself; without it in sys.modules, an import of our own is seen
    del sys.modules[name]
for name in sys.argv[2:]:
    before = heavy()
    importlib.import_module(name)
    if heavy() - before:
        print(f"{name} imports {', '.join(sorted(heavy() - before))}")
    if torch.cuda.is_initialized():
        print(f"{name} initialises CUDA")
"""
"""Imports the modules named by the arguments, one after the other; prints those that load a package of the first argument."""


def modules() -> list[str]:
    """Return the dotted names of all modules of the project."""
    files = (path.relative_to(ROOT).with_suffix("") for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    return [".".join(path.parts).removesuffix(".__init__") for path in files]


def heavy_imports(names: list[str], search: Path = ROOT) -> list[str]:
    """Import modules in a fresh process; returns one line for each module that loads a heavy package."""
    command = [sys.executable, "-c", REPORT, ",".join(HEAVY), *names]
    done = subprocess.run(command, cwd=search, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_any_module_loads_no_cuda_and_no_tensorrt():
    assert heavy_imports(modules()) == []


def test_a_module_that_imports_a_cuda_package_is_found(tmp_path):
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda/__init__.py").touch()
    (tmp_path / "light.py").write_text("import json\n")
    (tmp_path / "with_pycuda.py").write_text("import pycuda\n")
    (tmp_path / "with_runtime.py").write_text("from cuda.bindings import runtime\n")
    found = heavy_imports(["light", "with_pycuda", "with_runtime"], tmp_path)
    assert found[0] == "with_pycuda imports pycuda"
    assert found[1].startswith("with_runtime imports cuda, cuda.bindings")
    assert len(found) == 2
