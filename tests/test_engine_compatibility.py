"""The checks of an engine's GPU and version, the command that builds it again, and the check for TensorRT 8.6; none needs a GPU."""

import dataclasses
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sealed_facts import engine_facts, onnx_facts
from small_networks import INPUTS, OUTPUTS

from engine import backend, build, compatibility, trt86_check
from engine.backend import Backend, EngineError, Gpu
from qdbev import artifact, deployed_graph
from qdbev.artifact import Seal
from qdbev.facts import BuildOptions, Target
from qdbev.ops import contract
from qdbev.schema import Interface

H100 = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", bus_id="0000:00:1E.0")
H200 = Gpu(name="NVIDIA H200", compute_capability="9.0", bus_id="0000:00:1E.0")
ADA = Gpu(name="NVIDIA RTX 4090", compute_capability="8.9", bus_id="0000:00:1E.0")
PLUGIN = ("MultiscaleDeformableAttnPlugin_TRT", "1", "")


def seal(name: str, version: str, target: dict[str, Any], build: BuildOptions | None = None) -> Seal:
    capabilities = target["compute_capabilities"]
    facts = engine_facts(
        backend=(name, version),
        capabilities=None if capabilities is None else tuple(capabilities),
        gpu=target.get("gpu"),
        build=build,
    )
    return Seal(kind="engine", config={}, parent=None, facts=facts, provenance={})


def installed(name: backend.BackendName, version: str) -> Backend:
    return Backend(name=name, module=backend, version=version)  # which nobody asks for anything


def test_an_engine_runs_on_the_gpus_it_was_built_for_only() -> None:
    path = Path("run/w8a8.engine")
    for_h100 = seal("tensorrt", "11.4.0.106", {"gpu": H100.name, "compute_capabilities": ["9.0"]})
    compatibility.require_gpu(path, for_h100, H100)
    message = (
        r"w8a8\.engine was built for the NVIDIA H100 80GB HBM3 \(9\.0\); this is a NVIDIA H200 \(9\.0\)\. Build it again here:\n  python"
    )
    with pytest.raises(EngineError, match=message):
        compatibility.require_gpu(path, for_h100, H200)  # of the same compute capability
    several = seal("tensorrt-rtx", "1.7.1", {"compute_capabilities": ["8.6", "8.9"]})
    compatibility.require_gpu(path, several, ADA)
    with pytest.raises(EngineError, match=r"GPUs of compute capability 8\.6, 8\.9; this is a NVIDIA H100"):
        compatibility.require_gpu(path, several, H100)
    compatibility.require_gpu(path, seal("tensorrt-rtx", "1.7.1", {"compute_capabilities": None}), ADA)


def test_an_engine_runs_under_the_version_that_built_it_only() -> None:
    path = Path("run/w8a8.engine")
    built = seal("tensorrt", "10.13.3.9", {"gpu": H100.name, "compute_capabilities": ["9.0"]})
    compatibility.require_version(path, built, installed("tensorrt", "10.13.3.9"), H100)
    message = r"built with tensorrt 10\.13\.3\.9, installed is 11\.4\.0\.106, .*\n  python .*\n.*pip install tensorrt==10\.13\.3\.9"
    with pytest.raises(EngineError, match=message):
        compatibility.require_version(path, built, installed("tensorrt", "11.4.0.106"), H100)


@pytest.mark.parametrize(
    ("made", "device", "wanted"),
    [
        (seal("tensorrt", "10.13", {"gpu": H200.name, "compute_capabilities": ["9.0"]}), H100, "--backend tensorrt"),
        (
            seal("tensorrt-rtx", "1.7", {"compute_capabilities": ["12.0", "8.6"]}),
            ADA,
            "--backend tensorrt-rtx --compute-capability 8.6 8.9 12.0",
        ),
        (seal("tensorrt-rtx", "1.7", {"compute_capabilities": ["8.6"]}), H100, "--backend tensorrt"),  # which RTX does not build for
        (seal("tensorrt-rtx", "1.4", {"compute_capabilities": None}), ADA, "--backend tensorrt-rtx"),
        (
            seal(
                "tensorrt",
                "10.13",
                {"gpu": H200.name, "compute_capabilities": ["9.0"]},
                build=BuildOptions(onnx="../onnx/my net.onnx", memory_limit_mb=512, allow_float=True),
            ),
            H100,
            "--backend tensorrt --memory-limit 512 --allow-float",
        ),
    ],
)
def test_the_rebuild_command_is_whole_and_the_builder_understands_it(made: Seal, device: Gpu, wanted: str) -> None:
    words = shlex.split(compatibility.rebuild_command(Path("runs/demo/w8a8.engine"), made, device))
    assert words[:3] == ["python", "-m", "engine.build"]
    args = build.parse_args(words[3:])
    assert args.onnx == Path("runs/onnx/my net.onnx" if made.facts.build else "runs/demo/w8a8.onnx")
    assert args.out == Path("runs/demo/w8a8.engine")
    assert " ".join(words[7:]) == wanted


@pytest.mark.parametrize(("version", "typed"), [("8.6.1", False), ("10.0.1", True), ("11.4.0.106", True)])
def test_versions_with_and_without_strong_typing(version: str, typed: bool) -> None:
    assert installed("tensorrt", version).strongly_typed is typed
    assert installed("tensorrt-rtx", "1.7.1").strongly_typed


@pytest.mark.parametrize("version", ["8.5.3.1", "9.3.0", "7.2"])
def test_a_version_between_the_supported_ones_is_refused(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text(f"__version__ = {version!r}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # put back as it was in the end
    del sys.modules["tensorrt"]
    with pytest.raises(EngineError, match=rf"TensorRT {version} is not supported; 8\.6, or 10\.0 and newer: pip install"):
        backend.load("tensorrt")


def network(
    opset: int = 17, op: str = PLUGIN[0], weight: np.dtype | type = np.float32, cast: int = TensorProto.FLOAT, body: bool = False
) -> onnx.ModelProto:
    """A network of an attention, a product and a cast."""
    nodes = [
        helper.make_node(op, ["x"], ["y"], name="encoder.attention", domain=contract.DOMAIN),
        helper.make_node("MatMul", ["y", "w"], ["z"], name="encoder.linear"),
        helper.make_node("Cast", ["z"], ["out"], name="encoder.cast", to=cast),
    ]
    weights = [numpy_helper.from_array(np.ones((4, 4), weight), "w")]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "out")]
    drawn = helper.make_graph(nodes, "drawn", info[:1], info[1:], weights)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(contract.DOMAIN, 1)]
    inner = [helper.make_node("Identity", ["x"], ["y"])]
    functions = [helper.make_function(contract.DOMAIN, op, ["x"], ["y"], inner, opsets[:1])] if body else []
    return helper.make_model(drawn, opset_imports=opsets, functions=functions)


def test_tensorrt_8_reads_float32_of_operator_set_17_with_its_own_attention() -> None:
    trt86_check.check(network(), frozenset({PLUGIN}))
    trt86_check.check(network(body=True), frozenset({PLUGIN}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": contract.OPSET}, r"of operator set 18; TensorRT 8\.6 reads up to 17 and would misread newer nodes"),
        ({"op": "SpatialCrossAttention", "body": True}, r"node encoder\.attention is a qdbev::SpatialCrossAttention; .*no local functions"),
        ({"weight": np.float16}, r"weight w is float16; TensorRT 8\.6 has no strong typing"),
        ({"cast": TensorProto.FLOAT16}, r"the output of node encoder\.cast is float16"),
    ],
)
def test_what_tensorrt_8_cannot_read_is_refused_with_what_to_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=rf"{message}.*or build with TensorRT 10 or newer\Z"):
        trt86_check.check(network(**changes), frozenset({PLUGIN}))


def test_a_node_that_tensorrt_8_refuses_is_found_by_its_position(tmp_path: Path) -> None:
    class Refusal:
        def __init__(self, index: int) -> None:
            self.index = index

        def node(self) -> int:
            return self.index

    onnx.save(network(), tmp_path / "m.onnx")
    assert build._refused_node(Refusal(1), tmp_path / "m.onnx") == ("encoder.linear", "MatMul")
    assert build._refused_node(Refusal(-1), tmp_path / "m.onnx") == ("", "")
    assert deployed_graph.node_name(network().graph.node[1]) == "encoder.linear"


def test_kernel_timings_are_kept_apart_for_each_version_and_gpu(tmp_path: Path) -> None:
    chosen, target = installed("tensorrt", "11.4.0.106"), Target(compute_capabilities=("9.0",), gpu=H100.name)
    found = build.timing_cache_file(chosen, target, tmp_path)
    assert found == tmp_path / "tensorrt-11.4.0.106-nvidia-h100-80gb-hbm3.timing"
    assert found != build.timing_cache_file(chosen, dataclasses.replace(target, gpu=H200.name), tmp_path)
    assert found != build.timing_cache_file(installed("tensorrt", "10.13.3.9"), target, tmp_path)
    assert build.timing_cache_file(chosen, target, tmp_path / "mine.timing") == tmp_path / "mine.timing"
    assert build.timing_cache_file(chosen, target, None) is None
    assert build.timing_cache_file(installed("tensorrt-rtx", "1.7.1"), target, tmp_path) is None


def test_a_build_with_tensorrt_8_reads_the_onnx_as_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The binding has only the names used before parsing, because TensorRT 8.6 cannot be installed without its GPU libraries."""
    registered = SimpleNamespace(plugin_creator_list=[SimpleNamespace(name=PLUGIN[0], plugin_version="1", plugin_namespace="")])
    module = SimpleNamespace(init_libnvinfer_plugins=lambda logger, namespace: None, get_plugin_registry=lambda: registered)
    monkeypatch.setattr(backend, "select", lambda wanted: Backend(name="tensorrt", module=module, version="8.6.1"))
    model = network(opset=contract.OPSET)
    for names, items in ((INPUTS, model.graph.input), (OUTPUTS, model.graph.output)):
        del items[:]
        items.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in names)
    onnx.save(model, tmp_path / "net.onnx")
    artifact.seal(
        tmp_path / "net.onnx",
        config={},
        parent=None,
        facts=onnx_facts(Interface(inputs=dict.fromkeys(INPUTS, (1, 4)), outputs=dict.fromkeys(OUTPUTS, (1, 4)))),
    )
    with pytest.raises(EngineError, match=r"operator set 18; TensorRT 8\.6 reads up to 17"):
        build.build_file(tmp_path / "net.onnx", tmp_path / "net.engine", build.Options(backend="tensorrt"))
    assert build._plugins(backend.select(None)) == {PLUGIN}
