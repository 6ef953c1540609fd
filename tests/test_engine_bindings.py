"""Every name of TensorRT that the engine room uses exists in the bindings, as far as some can be imported here.

Without a GPU most of that code never runs, so a wrong name would only be found on the user's machine.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ENGINE = Path(__file__).resolve().parents[1] / "engine"
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "onnx_parser": "OnnxParser",
    "error": "ParserError",
    "cache": "ITimingCache",
    "registry": "IPluginRegistry",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
}
"""Class of TensorRT objects by the name of the variable that the engine room uses for them."""
FILES = ("build_tensorrt", "captured_context", "trt_callbacks", "session", "backend")
OF_RTX = {
    "ComputeCapability",
    "ComputeCapability.__members__",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}


def used() -> set[str]:
    """Names of TensorRT that the engine room uses, such as Builder.create_network."""
    return {name for file in FILES for name in names(ast.parse((ENGINE / f"{file}.py").read_text()))}


def names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        chain = [node.attr]
        inner = node.value
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        chain.insert(0, inner.id if isinstance(inner, ast.Name) else "")
        if "module" in chain[:-1]:
            chain = ["trt", *chain[chain.index("module") + 1 :]]
        if chain[0] == "trt":
            yield ".".join(chain[1:])
        elif chain[-2] in CLASSES:
            yield f"{CLASSES[chain[-2]]}.{chain[-1]}"


def missing(trt: ModuleType) -> set[str]:
    """Used names that `trt` does not have."""
    found = set()
    for name in used():
        inner = trt
        for part in name.split("."):
            inner = getattr(inner, part, None)
        if inner is None:
            found.add(name)
    return found


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_every_name_of_tensorrt_that_is_used_exists(name: str) -> None:
    trt = pytest.importorskip(name, reason=f"needs the Python package {name}")
    assert missing(trt) == (set() if name == "tensorrt_rtx" else OF_RTX)


def test_the_names_are_found_in_the_code() -> None:
    some = {"Builder.build_serialized_network", "IBuilderConfig.set_timing_cache", "ICudaEngine.get_tensor_shape", "Runtime", "nptype"}
    assert some | OF_RTX <= used()


@pytest.mark.parametrize("slip", ["config.set_flags(1)", "self._engine.get_tensors()", "trt.TensorIOMode.INPUTS", "self._b.module.Run()"])
def test_a_slip_would_be_found(slip: str) -> None:
    trt = importlib.import_module("tensorrt_rtx") if importlib.util.find_spec("tensorrt_rtx") else None
    if trt is None:
        pytest.skip("needs TensorRT-RTX")
    (name,) = set(names(ast.parse(slip))) - {"TensorIOMode"}
    first, _, rest = name.partition(".")
    assert not hasattr(getattr(trt, first, None), rest or first)
