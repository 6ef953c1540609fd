"""Finds the library that builds and runs engines, and the GPU of this machine, and says how to install what is missing.

TensorRT needs an NVIDIA GPU and its driver for everything, even for parsing. TensorRT-RTX builds on any machine, ahead of time, for GPUs of
compute capability 8.0 to 12.1 without 9.0, and runs on these. OpenVINO builds for the CPU that it runs on. Importing this module loads
none of them and does not start CUDA.
"""

import functools
import importlib
import importlib.util
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from qdbev import cuda_check

BackendName = Literal["tensorrt", "tensorrt-rtx", "cpu"]
_MODULES: dict[BackendName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "cpu": "openvino"}
_INSTALL: dict[BackendName, str] = {
    "tensorrt": "pip install -r requirements-gpu.txt",
    "tensorrt-rtx": "pip install -r requirements.txt",
    "cpu": "pip install -r requirements.txt",
}
_OLDEST_TENSORRT = (10, 1)
"""The first version with all names that the engine room uses (`device_memory_size_v2` is the newest of them)."""


class EngineError(ValueError):
    """An error that a user can correct: a wrong file or setting, a missing package or GPU, a quantized layer that runs in float."""


check = functools.partial(cuda_check.check, error=EngineError)
"""Function that returns the values of a cuda-python call, and raises EngineError if the call failed."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU of this machine. `bus_id` is its PCI address in the form that nvidia-smi takes."""

    name: str
    compute_capability: str
    bus_id: str


@dataclass(frozen=True)
class Backend:
    """A TensorRT or OpenVINO that is installed here. `module` is its Python binding."""

    name: BackendName
    module: ModuleType
    version: str


def select(wanted: BackendName | None = None) -> Backend:
    """Load the builder to use: `wanted` if given, else TensorRT if there is a GPU and TensorRT-RTX if there is none.

    Raises EngineError as `load` does, or if TensorRT is wanted on a machine without a GPU.
    """
    device = gpu()
    if wanted == "tensorrt" and device is None:
        raise EngineError(
            "TensorRT needs an NVIDIA GPU and driver even to parse, and none was found here; "
            "--backend tensorrt-rtx builds and audits without a GPU"
        )
    if wanted is None:
        wanted = "tensorrt" if device and importlib.util.find_spec("tensorrt") else "tensorrt-rtx"
    return load(wanted)


def load(name: BackendName) -> Backend:
    """Import the Python binding of a backend. Raises EngineError if it is missing, cannot be loaded, or is too old."""
    try:
        module = importlib.import_module(_MODULES[name])
    except (ImportError, OSError) as error:
        raise EngineError(f"{_MODULES[name]} cannot be imported ({error}); {_INSTALL[name]}") from error
    if name == "tensorrt" and release(module.__version__) < _OLDEST_TENSORRT:
        raise EngineError(f"TensorRT {module.__version__} is not supported; 10.1 or newer is: {_INSTALL[name]}")
    return Backend(name=name, module=module, version=module.__version__)


def require_gpu(purpose: str) -> Gpu:
    """The GPU of this machine. Raises EngineError, which begins with `purpose`, if there is none that is usable."""
    device = gpu()
    if device is None:
        raise EngineError(
            f"{purpose} needs an NVIDIA GPU with its driver (libcuda.so.1), and none was found on this machine; run it where there is one. "
            "Without a GPU: `python -m engine.audit` on the engine, `python -m eval.run` on the .onnx"
        )
    return device


def gpu() -> Gpu | None:
    """The first GPU, or None if there is no GPU or no driver."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    try:
        check(driver.cuInit(0))
        device = check(driver.cuDeviceGet(0))
        name = check(driver.cuDeviceGetName(128, device)).split(b"\0")[0].decode()
        bus_id = check(driver.cuDeviceGetPCIBusId(32, device)).split(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute
        major = check(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
        minor = check(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    except (RuntimeError, EngineError):
        return None
    return Gpu(name=name, compute_capability=f"{major}.{minor}", bus_id=bus_id)


def cuda_runtime() -> Any:
    """The module of cuda-python with CUDA's runtime API."""
    from cuda.bindings import runtime

    return runtime


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version string."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
