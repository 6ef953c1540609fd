"""Building and auditing real engines with TensorRT-RTX, which needs no GPU."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine import audit, backend, build, build_tensorrt, compatibility, layer_table, onnx_products, trt_callbacks
from engine.backend import EngineError
from qdbev import artifact
from qdbev.deployed_graph import DeployedGraphError
from qdbev.facts import BuildOptions, OnnxFacts, Target
from qdbev.ops import contract
from qdbev.schema import Interface

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install -r requirements.txt")

INTERFACE = Interface(
    inputs={"images": (1, 3, 8, 8), "lidar2img": (18, 4), "can_bus": (1, 18), "prev_bev": (1, 64, 32), "has_prev": (1,)},
    outputs={"cls_logits": (1, 4), "box_code": (1, 64, 32), "bev": (1, 64, 32)},
    recurrent=(("bev", "prev_bev"),),
    geometry=("lidar2img", "can_bus", "has_prev"),
    coordinates=("box_code",),
)
"""Names and shapes of the drawn graphs."""


class Drawing:
    """An ONNX with the deployed inputs and outputs, drawn node by node. One scale per tensor unless `scales` says otherwise."""

    def __init__(self, activation_bits: int = 8) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.bits = activation_bits
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def quantized(self, x: str, name: str, scales: int = 1, axis: int = -1) -> str:
        """Add QuantizeLinear and DequantizeLinear; below 8 bits a Clip comes first, as the exporter writes it."""
        scale = np.float32(0.05)
        if self.bits < 8:
            low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
            limits = [self.constant(f"{name}.{end}", np.float32(end * scale)) for end in (low, high)]
            x = self.node("Clip", [x, *limits], f"{name}.clip")
        shape = () if scales == 1 else (scales,)
        parameters = [self.constant(f"{name}.scale", np.full(shape, scale)), self.constant(f"{name}.zero", np.zeros(shape, np.int8))]
        axes = {} if scales == 1 else {"axis": axis}
        return self.node(
            "DequantizeLinear", [self.node("QuantizeLinear", [x, *parameters], f"{name}.q", **axes), *parameters], f"{name}.dq", **axes
        )

    def weight(self, shape: tuple[int, ...], name: str, axis: int) -> str:
        stored = self.constant(f"{name}.weight", self.random.integers(-7, 8, shape).astype(np.int8))
        scale = self.constant(f"{name}.weight.scale", np.full(shape[axis], 0.02, np.float32))
        zero = self.constant(f"{name}.weight.zero", np.zeros(shape[axis], np.int8))
        return self.node("DequantizeLinear", [stored, scale, zero], f"{name}.weight.dq", axis=axis)

    def conv(self, x: str, name: str, cin: int, cout: int, kernel: int = 3) -> str:
        bias = self.constant(f"{name}.bias", np.ones(cout, np.float32))
        return self.node("Conv", [x, self.weight((cout, cin, kernel, kernel), name, 0), bias], name, pads=[kernel // 2] * 4)

    def linear(self, x: str, name: str, cin: int, cout: int) -> str:
        product = self.node("MatMul", [x, self.weight((cin, cout), name, 1)], name)
        return self.node("Add", [product, self.constant(f"{name}.bias", np.ones(cout, np.float32))], f"{name}.add")

    def save(self, path: Path, bev: str) -> Path:
        """Write and seal the model with the output `bev` (1, 64, 32); the other inputs and outputs are not connected to it."""
        self.node("Add", [bev, "prev_bev"], "next")
        self.node("Mul", ["next:0", "has_prev"], "gated")
        outputs = {"next:0": "bev", "gated:0": "box_code"}
        for node in self.nodes:
            node.output[:] = [outputs.get(name, name) for name in node.output]
            node.input[:] = [outputs.get(name, name) for name in node.input]
        self.nodes.append(helper.make_node("MatMul", ["can_bus", "lidar2img"], ["cls_logits"], name="geometry"))
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in INTERFACE.inputs.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in INTERFACE.outputs.items()]
        drawn = helper.make_graph(self.nodes, "drawing", inputs, results, self.initializers)
        opsets = [helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
        onnx.save(helper.make_model(drawn, opset_imports=opsets, ir_version=9, functions=self.functions), path)
        artifact.seal(path, config={"name": "drawing"}, parent=None, facts=OnnxFacts(interface=INTERFACE, bytes=path.stat().st_size))
        return path


def detector(path: Path, *, bits: int = 8, scales: int = 1) -> Path:
    """A residual convolution block, two linears and an attention; `scales` > 1 gives the first linear's input one scale per channel."""
    d = Drawing(bits)
    x = d.quantized(d.conv(d.quantized("images", "backbone.in"), "backbone.conv1", 3, 32), "backbone.q1")
    y = d.node("Relu", [d.node("Add", [d.conv(x, "backbone.conv2", 32, 32), x], "backbone.add")], "backbone.relu")
    y = d.node("Reshape", [y, d.constant("flat", np.array([1, 32, 64]))], "neck.flat")
    y = d.node("Transpose", [y], "neck.tokens", perm=[0, 2, 1])
    y = d.node("Relu", [d.linear(d.quantized(y, "ffn.in", scales, 2), "encoder.ffn.0", 32, 64)], "ffn.relu")
    y = d.linear(d.quantized(y, "ffn.mid"), "encoder.ffn.1", 64, 32)
    query = d.quantized(y, "attention.query")
    key = d.node("Transpose", [d.quantized(y, "attention.key")], "attention.key.t", perm=[0, 2, 1])
    weights = d.node("Softmax", [d.node("MatMul", [query, key], "attention.qk")], "attention.softmax", axis=-1)
    y = d.node("MatMul", [d.quantized(weights, "attention.weights"), d.quantized(y, "attention.value")], "attention.pv")
    return d.save(path, y)


def sampler(path: Path, *, body: bool = True) -> Path:
    """A custom operator between two linears, with or without the local function that is its body."""
    d = Drawing()
    d.functions = [
        helper.make_function(
            contract.DOMAIN,
            "Sample",
            ["value"],
            ["out"],
            [helper.make_node("Sin", ["value"], ["out"])],
            [helper.make_opsetid("", contract.OPSET)],
        )
    ][: int(body)]
    y = d.linear(d.quantized("prev_bev", "in"), "value_proj", 32, 32)
    y = d.node("Sample", [y], "sample", domain=contract.DOMAIN, plugin_namespace=contract.DOMAIN, plugin_version="1")
    return d.save(path, d.linear(d.quantized(y, "out"), "output_proj", 32, 32))


def reseal(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    artifact.seal(path, config={}, parent=None, facts=OnnxFacts(interface=INTERFACE, bytes=path.stat().st_size))
    return path


def fell_back(facts: dict[str, list[dict[str, str]]]) -> list[str]:
    """Names of the quantized layers that run in float, from the facts of an audit."""
    return [layer["name"] for layer in facts["float_layers"] if layer["reason"].startswith("fell back")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Paths of the ONNX and the engine of `detector`, built by the command line."""
    path = detector(tmp_path_factory.mktemp("run") / "w8a8.onnx")
    build.main(["--onnx", str(path), "--backend", "tensorrt-rtx", "--compute-capability", "8.6", "8.9", "--memory-limit", "256"])
    return path, path.with_suffix(".engine")


def test_quantized_convolution_linear_and_matmul_run_in_int8(built: tuple[Path, Path]) -> None:
    report = audit.audit_files(built[1], built[0])
    wanted = {"backbone.conv1", "backbone.conv2", "encoder.ffn.0", "encoder.ffn.1", "attention.qk", "attention.pv"}
    assert {row.name: row.got for row in report.rows} == dict.fromkeys(wanted, "INT8")
    assert report.int8_kernels == 6
    assert report.summary.startswith("6 of 6 quantized layers run INT8")


def test_the_engine_seal_holds_parent_target_options_and_interface(built: tuple[Path, Path]) -> None:
    seal, parent = artifact.unseal(built[1], "engine"), artifact.unseal(built[0], "onnx")
    assert seal.parent == parent.sha256
    assert seal.config == parent.config
    assert seal.facts.backend.name == "tensorrt-rtx"
    assert seal.facts.target == Target(compute_capabilities=("8.6", "8.9"))
    assert seal.facts.plan_bytes == built[1].stat().st_size
    assert seal.facts.build == BuildOptions(onnx="w8a8.onnx", memory_limit_mb=256, allow_float=False)
    assert seal.facts.interface == INTERFACE
    assert seal.facts.plugins == ()
    assert fell_back(seal.facts.audit) == []


def test_six_bit_activations_cost_no_kernel_more_than_eight(tmp_path: Path, built: tuple[Path, Path]) -> None:
    narrow = build.build_file(detector(tmp_path / "w4a6.onnx", bits=6), tmp_path / "w4a6.engine", build.Options(backend="tensorrt-rtx"))
    wide = audit.audit_files(built[1], built[0])
    assert not narrow.offenders
    assert (narrow.kernels, narrow.int8_kernels) == (wide.kernels, wide.int8_kernels)


def test_a_layer_that_falls_back_to_float_fails_the_build_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = detector(tmp_path / "planted.onnx", scales=32)
    with pytest.raises(
        SystemExit, match=r"1 quantized layers silently run in float:\n  encoder\.ffn\.0 \(MatMul\): FP32 .* scale per channel"
    ):
        build.main(["--onnx", str(path), "--backend", "tensorrt-rtx"])
    assert not path.with_suffix(".engine").exists()
    assert fell_back(json.loads((tmp_path / "planted.engine.refused.json").read_text())) == ["encoder.ffn.0"]
    assert not audit.report_path(path.with_suffix(".engine")).exists()


def test_audit_of_an_engine_with_float_layers_exits_with_an_error(tmp_path: Path) -> None:
    path = detector(tmp_path / "planted.onnx", scales=32)
    build.main(["--onnx", str(path), "--backend", "tensorrt-rtx", "--allow-float"])
    command = [sys.executable, "-m", "engine.audit", "--engine", str(path.with_suffix(".engine")), "--onnx", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False, timeout=240)
    assert done.returncode != 0
    assert "5 of 6 quantized layers run INT8" in done.stderr
    assert "encoder.ffn.0" in done.stderr
    assert fell_back(artifact.unseal(path.with_suffix(".engine"), "engine").facts.audit) == ["encoder.ffn.0"]


def test_a_forgotten_input_quantizer_is_named(tmp_path: Path) -> None:
    d = Drawing()
    path = d.save(tmp_path / "half.onnx", d.linear("prev_bev", "encoder.linear", 32, 32))
    with pytest.raises(EngineError, match=r"encoder\.linear \(MatMul\): .*its input 0 does not come through Q/DQ"):
        build.build_file(path, tmp_path / "half.engine", build.Options(backend="tensorrt-rtx"))


def test_linears_that_share_one_input_quantizer_become_one_kernel_and_each_is_found(tmp_path: Path) -> None:
    d = Drawing()
    x = d.quantized("prev_bev", "in")
    path = d.save(tmp_path / "m.onnx", d.node("Add", [d.linear(x, "offsets", 32, 32), d.linear(x, "logits", 32, 32)], "sum"))
    report = build.build_file(path, tmp_path / "m.engine", build.Options(backend="tensorrt-rtx"))
    assert report.int8_kernels == 1
    assert [row.got for row in report.rows] == ["INT8", "INT8"]


def test_a_custom_operator_is_inlined_and_its_neighbours_stay_int8(tmp_path: Path) -> None:
    report = build.build_file(sampler(tmp_path / "s.onnx"), tmp_path / "s.engine", build.Options(backend="tensorrt-rtx"))
    assert {row.name: row.got for row in report.rows} == {"value_proj": "INT8", "output_proj": "INT8"}


def test_a_custom_operator_without_body_is_named(tmp_path: Path) -> None:
    path = sampler(tmp_path / "s.onnx", body=False)
    with pytest.raises(DeployedGraphError, match="node sample is a qdbev::Sample without a function body"):
        build.build_file(path, tmp_path / "s.engine", build.Options(backend="tensorrt-rtx"))


def test_a_missing_onnx_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*none\.onnx does not exist"):
        build.main(["--onnx", str(tmp_path / "none.onnx")])


def test_a_corrupt_onnx_is_named(tmp_path: Path) -> None:
    path = detector(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(artifact.ArtifactError, match="not the file that was sealed"):
        build.build_file(path, tmp_path / "m.engine", build.Options(backend="tensorrt-rtx"))
    artifact.seal(path, config={}, parent=None, facts=OnnxFacts(interface=INTERFACE, bytes=1000))
    with pytest.raises(DeployedGraphError, match=r"m\.onnx is damaged or no ONNX file"):
        build.build_file(path, tmp_path / "m.engine", build.Options(backend="tensorrt-rtx"))
    assert not (tmp_path / "m.engine").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    path = detector(tmp_path / "m.onnx")
    model = onnx.load(path)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "encoder.ffn.0.bias")
    values = numpy_helper.to_array(bias).copy()
    values[3] = value
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    with pytest.raises(DeployedGraphError, match=r"1 of 64 values of weight encoder\.ffn\.0\.bias are NaN"):
        build.build_file(reseal(path, model), tmp_path / "m.engine", build.Options(backend="tensorrt-rtx"))


def test_inputs_of_another_name_are_listed(tmp_path: Path) -> None:
    path = detector(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.input[0].name = model.graph.node[0].input[0] = "img"
    with pytest.raises(DeployedGraphError, match=r"has the inputs img, .*missing: images; unknown: img"):
        build.build_file(reseal(path, model), tmp_path / "m.engine", build.Options(backend="tensorrt-rtx"))


def test_a_parser_error_names_the_node(tmp_path: Path) -> None:
    d = Drawing()
    path = d.save(tmp_path / "m.onnx", d.node("Reshape", ["prev_bev", d.constant("shape", np.array([1, 5, 5]))], "neck.reshape"))
    with pytest.raises(EngineError, match=r"the parser refuses .*\n  node neck\.reshape \(Reshape\): "):
        build.build_file(path, tmp_path / "m.engine", build.Options(backend="tensorrt-rtx"))


def test_an_engine_made_from_another_onnx_is_refused(tmp_path: Path, built: tuple[Path, Path]) -> None:
    other = sampler(tmp_path / "other.onnx")
    with pytest.raises(SystemExit, match=r"error: .*w8a8\.engine was made from .*, not from .*other\.onnx"):
        audit.main(["--engine", str(built[1]), "--onnx", str(other)])


def test_an_unknown_gpu_generation_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = sampler(tmp_path / "s.onnx")
    with pytest.raises(EngineError, match=r"cannot build for 9\.0; it knows .*8\.9, 12\.0"):
        build.build_file(path, tmp_path / "s.engine", build.Options(backend="tensorrt-rtx", compute_capabilities=("9.0",)))


@pytest.mark.skipif(backend.gpu() is not None, reason="this machine has a GPU")
def test_full_tensorrt_without_a_gpu_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: TensorRT needs an NVIDIA GPU.*--backend tensorrt-rtx"):
        build.main(["--onnx", str(sampler(tmp_path / "s.onnx")), "--backend", "tensorrt"])


def test_an_interrupted_build_leaves_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(OSError, match="no space"):
        build.build_file(sampler(tmp_path / "s.onnx"), tmp_path / "s.engine", build.Options(backend="tensorrt-rtx"))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".engine") or path.name.startswith(".s.engine")]


def test_a_build_that_fails_names_the_error_inside_a_plugin_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = backend.load("tensorrt-rtx").module
    failures = ["of the build before"]

    class Builder(trt.Builder):
        def build_serialized_network(self, *_: object) -> None:
            failures.append("SpatialCrossAttention: 12 channels a head")

    monkeypatch.setattr(build_tensorrt, "_register_plugins", lambda chosen: failures)
    monkeypatch.setattr(trt, "Builder", Builder)
    with pytest.raises(EngineError, match=r"built no engine from .*s\.onnx:\n  SpatialCrossAttention: 12 channels a head"):
        build.build_file(sampler(tmp_path / "s.onnx"), tmp_path / "s.engine", build.Options(backend="tensorrt-rtx"))


def test_the_command_that_is_given_for_another_gpu_builds_for_both(tmp_path: Path, built: tuple[Path, Path]) -> None:
    engine = tmp_path / "w8a8.engine"
    for suffix in ("", ".seal.json"):
        (tmp_path / f"w8a8.onnx{suffix}").write_bytes(Path(f"{built[0]}{suffix}").read_bytes())
        (tmp_path / f"w8a8.engine{suffix}").write_bytes(Path(f"{built[1]}{suffix}").read_bytes())
    device = backend.Gpu(name="NVIDIA RTX 5090", compute_capability="12.0", bus_id="")
    with pytest.raises(EngineError, match="NVIDIA RTX 5090") as refused:
        compatibility.require_gpu(engine, artifact.unseal(engine, "engine"), device)
    command = shlex.split(str(refused.value).splitlines()[1])
    build.main(command[3:])
    compatibility.require_gpu(engine, artifact.unseal(engine, "engine"), device)
    assert artifact.unseal(engine, "engine").facts.target.compute_capabilities == ("8.6", "8.9", "12.0")


def test_ctrl_c_ends_a_build_and_leaves_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trt_callbacks.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build.build_file(detector(tmp_path / "m.onnx"), tmp_path / "m.engine", build.Options(backend="tensorrt-rtx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.seal.json"]


def test_two_layers_of_one_name_are_refused(tmp_path: Path) -> None:
    model = onnx.load(detector(tmp_path / "m.onnx"))
    for node in model.graph.node:
        if node.name == "backbone.conv2":
            node.name = "backbone.conv1"
    with pytest.raises(EngineError, match="several layers of the ONNX are called backbone.conv1"):
        onnx_products.products(model, ())


def test_a_layer_no_kernel_names_is_an_offender() -> None:
    report = audit.audit([onnx_products.Product(name="gone", op="Conv", problem="")], [])
    with pytest.raises(EngineError, match=r"gone \(Conv\): absent in no kernel"):
        audit.require_int8(report)


def test_layer_table_of_another_engine_is_refused(tmp_path: Path) -> None:
    row = layer_table.Layer(name="l", kind="gemm", inputs=("INT8",), constants=("INT8",), outputs=("FP16",), tactic="", nodes=("l",))
    layer_table.save(tmp_path / "t.json", [row])
    assert layer_table.load(tmp_path / "t.json", artifact.sha256(tmp_path / "t.json")) == [row]
    layer_table.save(tmp_path / "t.json", [dataclasses.replace(row, name="other")])
    with pytest.raises(EngineError, match=r"t\.json is not of this engine"):
        layer_table.load(tmp_path / "t.json", "0" * 64)
