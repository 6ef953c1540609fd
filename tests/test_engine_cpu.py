"""Engines for a CPU: built and audited by OpenVINO, run on integers, compared with the ONNX, and refused where they do not fit.

The network is the W4A6 student of tests/format1, whose integer sums are exact on every CPU.
"""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from onnx import numpy_helper

from engine import audit, backend, bench, build, build_cpu, cpu
from engine.backend import EngineError
from engine.cpu_session import CpuSession
from engine.open_session import open_session
from engine.plan import Options
from engine.stream import open_engine
from engine.typical_frame import typical_inputs
from eval.engine_eval import family
from eval.open_model import open_model
from export import parity
from export.runner import OnnxRunner
from plugins.cpu import build as kernels
from qdbev import artifact, detectors
from qdbev.artifact import ArtifactError
from qdbev.config import from_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Arrays

OLD = Path(__file__).with_name("format1")


def copy_of_onnx(folder: Path) -> Path:
    for name in ("w4a6.onnx", "w4a6.onnx.seal.json"):
        shutil.copy(OLD / name, folder)
    return folder / "w4a6.onnx"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = copy_of_onnx(tmp_path_factory.mktemp("cpu")).with_suffix(".cpu.engine")
    build.main(["--backend", "cpu", "--onnx", str(path.with_name("w4a6.onnx")), "--out", str(path)])
    return path


@pytest.fixture
def moved(engine: Path, tmp_path: Path) -> Path:
    """A copy of the engine with its seal and layer table, which a test may change."""
    for path in engine.parent.glob(f"{engine.name}*"):
        shutil.copy(path, tmp_path)
    return tmp_path / engine.name


def resealed(engine: Path, **changes: object) -> None:
    """Seal the engine again with changed facts of its target or backend."""
    seal = artifact.unseal(engine, "engine")
    target = {key: value for key, value in changes.items() if key != "version"}
    facts = dataclasses.replace(seal.facts, target=dataclasses.replace(seal.facts.target, **target))
    if "version" in changes:
        facts = dataclasses.replace(facts, backend=dataclasses.replace(facts.backend, version=changes["version"]))
    artifact.seal(engine, config=seal.config, parent=None, facts=facts)


def inputs_of(engine: Path) -> Arrays:
    seal = artifact.unseal(engine, "engine")
    return typical_inputs(from_dict(seal.config), seal.facts.interface)


def test_every_quantized_product_runs_on_integers_and_the_seal_says_where(engine: Path) -> None:
    seal = artifact.unseal(engine, "engine")
    assert seal.facts.audit["int8_layers"] == seal.facts.audit["quantized_layers"] == 52
    assert seal.facts.audit["int8_flops_fraction"] == 1
    assert seal.facts.backend.name == "cpu"
    here = cpu.this_cpu()
    assert (seal.facts.target.cpu, seal.facts.target.instruction_set) == (here.name, here.instruction_set)
    assert seal.facts.build.onnx == "w4a6.onnx"
    report = audit.audit_files(engine, engine.with_name("w4a6.onnx"))
    assert not report.offenders
    assert {row.got for row in report.float_rows} <= {"FP32", "absent", "float"}


def test_the_engine_computes_what_the_onnx_computes_frame_after_frame(engine: Path) -> None:
    runner = OnnxRunner(engine.with_name("w4a6.onnx"))
    config = from_dict(runner.seal.config)
    frames = noise_frames(config.data, config.model.num_cameras, runner.seal.facts.image_hw)
    with open_session(engine, threads=1) as session:
        rows = parity.compare(runner, session.infer, frames, detectors.stream(config.model), parity.SUM_ORDER_CHANGE)
    assert {row.output for row in rows} == set(runner.interface.outputs)
    assert all(row.cosine > 0.999 for row in rows), parity.table(rows)


def test_a_recurrent_input_that_is_left_out_is_the_output_of_the_last_frame(engine: Path) -> None:
    inputs = inputs_of(engine)
    without = {name: value for name, value in inputs.items() if name != "prev_bev"}
    with open_session(engine) as session:
        first = session.infer({**without, "prev_bev": np.zeros_like(inputs["prev_bev"])})
        second = session.infer(without)
    with open_session(engine) as session:
        assert np.array_equal(session.infer(without, ["bev"])["bev"], first["bev"])
        again = session.infer({**without, "prev_bev": first["bev"]})
        assert session.compute_ms() > 0
    assert all(np.array_equal(second[name], again[name]) for name in second)
    assert not np.array_equal(first["bev"], second["bev"])


def test_wrong_tensors_are_refused_and_the_next_frame_works(engine: Path) -> None:
    inputs = inputs_of(engine)
    session = open_session(engine)
    with pytest.raises(EngineError, match="is not open; use it in a with statement"):
        session.infer(inputs)
    with session:
        for wrong, message in (
            ({"images": inputs["images"]}, "missing inputs: lidar2img, can_bus, has_prev"),
            ({**inputs, "images": inputs["images"][..., :-1]}, r"images is float32\(1, 6, 3, 64, 63\)"),
            ({**inputs, "can_bus": inputs["can_bus"].astype(np.float64)}, r"can_bus is float64\(1, 18\)"),
        ):
            with pytest.raises(EngineError, match=message):
                session.infer(wrong)
        assert np.isfinite(session.infer(inputs)["bev"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpu": "Another CPU"}, r"was built on another CPU \(Another CPU, \w+\); this is a "),
        ({"instruction_set": "amx_int8"}, r"was built on another CPU \(.*, amx_int8\)"),
        ({"version": "2024.1"}, "was built with OpenVINO 2024.1, installed is 20"),
        ({"cpu_kernels": "0123456789abcdef"}, "calls CPU kernels of version 0123456789abcdef; here they are"),
    ],
)
def test_an_engine_of_another_place_is_refused_with_the_command_that_builds_it(moved: Path, changes, message: str) -> None:
    if cpu.this_cpu().instruction_set == changes.get("instruction_set"):
        pytest.skip("this CPU has that instruction set")
    resealed(moved, **changes)
    with pytest.raises(EngineError, match=rf"{message}.*\n  python -m engine.build --onnx \S+w4a6.onnx --out \S+ --backend cpu"):
        CpuSession(moved)


def test_a_damaged_file_and_one_that_openvino_cannot_open_are_one_error(moved: Path) -> None:
    content = moved.read_bytes()
    moved.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="is not the file that was sealed"):
        CpuSession(moved)
    resealed_facts = json.loads((moved.parent / f"{moved.name}.seal.json").read_text())
    resealed_facts["sha256"] = artifact.sha256(moved)
    (moved.parent / f"{moved.name}.seal.json").write_text(json.dumps(resealed_facts))
    with pytest.raises(EngineError, match=r"cannot open it \(.*\); build it again: python -m engine.build"), CpuSession(moved):
        pass


@pytest.mark.parametrize("threads", [0, -3])
def test_numbers_of_threads_that_cannot_be_meant_are_refused(engine: Path, threads: int) -> None:
    with pytest.raises(EngineError, match=f"{threads} threads; give a positive number"):
        open_session(engine, threads)


def test_options_for_gpus_do_not_fit(tmp_path: Path) -> None:
    path = copy_of_onnx(tmp_path)
    with pytest.raises(EngineError, match="are for GPUs; leave them out with --backend cpu"):
        build.build_file(path, tmp_path / "x.engine", Options(backend="cpu", memory_limit_mb=64))
    assert not (tmp_path / "x.engine").exists()


def test_an_engine_with_other_numbers_than_its_onnx_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, right = copy_of_onnx(tmp_path), build_cpu.build_plan

    def planted(chosen, onnx_path, model, options):
        scale = next(tensor for tensor in model.graph.initializer if tensor.name == "neck.lateral.0.weight.scale")
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
        return right(chosen, onnx_path, model, options)

    monkeypatch.setattr(build_cpu, "build_plan", planted)
    with pytest.raises(EngineError, match=r"on this CPU \(.*\) the engine does not compute what .*w4a6.onnx computes: \w+ has a cosine of"):
        build.build_file(path, tmp_path / "x.engine", Options(backend="cpu"))
    assert not list(tmp_path.glob("x.engine*"))


def test_without_a_compiler_the_function_bodies_compute_the_same(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compiled_if_possible", lambda runtime: None)
    path = copy_of_onnx(tmp_path)
    report = build.build_file(path, tmp_path / "bodies.engine", Options(backend="cpu"))
    assert not report.offenders
    assert artifact.unseal(tmp_path / "bodies.engine", "engine").facts.target.cpu_kernels is None
    inputs = inputs_of(engine)
    with CpuSession(tmp_path / "bodies.engine") as bodies:
        ours = bodies.infer(inputs)
    monkeypatch.undo()
    with CpuSession(engine) as session:
        theirs = session.infer(inputs)
    for name, value in theirs.items():
        cosine = float(np.vdot(ours[name], value) / np.linalg.norm(ours[name]) / np.linalg.norm(value))
        assert cosine > 0.999


def test_the_engine_is_evaluated_compared_streamed_and_measured_like_every_other(engine: Path, tmp_path: Path) -> None:
    shutil.copy(OLD / "w4a6.pt", engine.parent)
    assert [path.name for path in family(engine)] == ["w4a6.pt", "w4a6.onnx", "w4a6.cpu.engine"]
    inputs = inputs_of(engine)
    with open_model(engine) as model:
        assert set(model.run(inputs)) == {"cls_logits", "box_code", "bev"}
    config = from_dict(artifact.unseal(engine, "engine").config)
    with open_engine(engine, threads=1) as detector:
        for frame in noise_frames(config.data, config.model.num_cameras, (64, 64)):
            assert len(detector(frame).scores) > 0
    bench.main(["--engine", str(engine), "--iterations", "5", "--threads", "1", "--out", str(tmp_path / "b.json")])
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["compute"]["runs"] == 5
    assert found["cpu"]["threads"] == 1 and found["cpu"]["peak_memory_mb"] > 50
    assert found["with_host"]["p50_ms"] > found["compute"]["p50_ms"]


def test_openvino_that_is_missing_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(EngineError, match=r"openvino cannot be imported .*pip install -r requirements.txt"):
        backend.load("cpu")


def test_the_onnx_of_the_engine_is_the_one_it_was_built_from(engine: Path) -> None:
    assert artifact.unseal(engine, "engine").parent == artifact.sha256(engine.with_name("w4a6.onnx"))
    assert onnx.load(engine.with_name("w4a6.onnx")).functions


def test_the_cpp_host_computes_what_python_computes(engine: Path, tmp_path: Path) -> None:
    compiler, package = shutil.which("g++"), Path(openvino.__file__).parent
    if compiler is None:
        pytest.skip("needs g++")
    library = next((package / "libs").glob("libopenvino.so.*"))
    links = [f"-L{library.parent}", f"-l:{library.name}", f"-Wl,-rpath,{library.parent}"]
    source = Path(__file__).parents[1] / "examples" / "cpp" / "host.cpp"
    flags = ["-std=c++17", "-DQDBEV_CPU", "-Wall", "-Wextra", "-Werror", f"-isystem{package / 'include'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(tmp_path / "host"), *links], check=True, timeout=240)
    inputs, folders = inputs_of(engine), [tmp_path / "000", tmp_path / "001"]
    wanted = []
    with open_session(engine) as session:
        for index, folder in enumerate(folders):
            folder.mkdir()
            for name in ("images", "lidar2img", "can_bus"):
                inputs[name].tofile(folder / f"{name}.bin")
            given = {name: value for name, value in inputs.items() if name != "prev_bev"}
            wanted.append(session.infer({**given, "has_prev": np.full(1, index, np.float32)}))
    environment = {**os.environ, "QDBEV_OPENVINO_EXTENSION": str(kernels.compiled_if_possible("openvino"))}
    command = [str(tmp_path / "host"), str(engine), *map(str, folders)]
    subprocess.run(command, check=True, env=environment, timeout=120)
    for folder, outputs in zip(folders, wanted, strict=True):
        for name in ("cls_logits", "box_code"):
            np.testing.assert_array_equal(np.fromfile(folder / f"{name}.bin", np.float32), outputs[name].ravel())
    done = subprocess.run([command[0], str(tmp_path / "absent"), str(folders[0])], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and done.stderr == f"error: {tmp_path / 'absent'} cannot be opened\n"
