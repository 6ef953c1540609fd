"""The C++ example compiles where the headers of TensorRT and CUDA are installed, and uses the deployed graph's own tensor names."""

import os
import shutil
import site
import subprocess
from pathlib import Path

import pytest
from small_networks import INPUTS, OUTPUTS

CPP = Path(__file__).parent.parent / "examples" / "cpp"
COMPILER = shutil.which("g++") or shutil.which("clang++")


def include_folders() -> list[Path]:
    """Folders that may contain the headers, besides those that the compiler searches by itself."""
    roots = [Path(os.environ[name]) for name in ("TENSORRT_ROOT", "CUDA_HOME") if os.environ.get(name)]
    wheels = [folder for packages in site.getsitepackages() for folder in Path(packages).glob("nvidia/*/include")]
    return [folder for folder in (*(root / "include" for root in (*roots, Path("/usr/local/cuda"))), *wheels) if folder.is_dir()]


def compiled(source: str, folder: Path = CPP) -> subprocess.CompletedProcess[str]:
    """Compile a C++17 source without writing a file; warnings in the vendor's headers are ignored."""
    includes = [argument for path in include_folders() for argument in ("-isystem", str(path))]
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{folder}", *includes, "-x", "c++", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def headers() -> None:
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    if compiled("#include <cuda_runtime_api.h>\n").returncode:
        pytest.skip("cuda_runtime_api.h is not installed: set CUDA_HOME, or install the wheels nvidia-cuda-runtime and nvidia-cuda-crt")
    if compiled("#include <NvInfer.h>\n").returncode:
        pytest.skip("NvInfer.h is not installed and in no wheel: set TENSORRT_ROOT to a TensorRT release or a clone of NVIDIA/TensorRT")


@pytest.mark.usefixtures("headers")
def test_the_host_compiles_without_a_warning():
    done = compiled((CPP / "host.cpp").read_text())
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("headers")
def test_the_compile_check_sees_a_call_that_tensorrt_does_not_have(tmp_path):
    header = (CPP / "bev_stream.h").read_text()
    (tmp_path / "bev_stream.h").write_text(header.replace("setDeviceMemoryV2", "setDeviceMemoryV3"))
    done = compiled((CPP / "host.cpp").read_text(), tmp_path)
    assert done.returncode != 0
    assert "setDeviceMemoryV3" in done.stderr


def test_the_host_uses_every_tensor_of_the_deployed_graph():
    code = (CPP / "bev_stream.h").read_text()
    assert not [name for name in (*INPUTS, *OUTPUTS) if f'"{name}"' not in code]


def test_the_page_about_engines_describes_every_tensor_of_the_deployed_graph():
    page = (CPP.parents[1] / "docs" / "engine.md").read_text()
    assert not [name for name in (*INPUTS, *OUTPUTS) if f"| `{name}` | (1" not in page]
