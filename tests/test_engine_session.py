"""The session runs a real network: onnxruntime replaces the engine and host memory replaces the GPU's memory (host_cuda.py)."""

import dataclasses
import inspect
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from small_networks import DATA

pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install -r requirements.txt")

from cuda.bindings import runtime
from host_cuda import COPY_MS, FAILED, NETWORK_MS, OK, PLAN, HostCuda, HostTensorRT
from sealed_facts import engine_facts

from engine import backend, bench, build
from engine.backend import Backend, EngineError, Gpu
from engine.memory import Buffers
from engine.preprocess import FrameError
from engine.session import Session
from engine.stream import StreamingDetector, open_engine
from export.runner import OnnxRunner
from qdbev import artifact, detectors
from qdbev.config import Config, from_dict, to_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Arrays, run_stream
from qdbev.facts import BuildOptions
from qdbev.schema import Frame

IMAGE_HW = (64, 64)
NETWORK = Path(__file__).with_name("format1") / "w4a6.onnx"
"""A small network for images of that size, as sealed ONNX."""
GPU = Gpu(name="Host", compute_capability="8.9", bus_id="")
NO_GPU = backend.gpu() is None
STREAMED = ("images", "lidar2img", "can_bus", "has_prev")


@dataclasses.dataclass
class Rig:
    """An engine file, the substitutes that it runs on, and its ONNX."""

    engine: Path
    cuda: HostCuda
    trt: HostTensorRT
    runner: OnnxRunner
    config: Config
    frames: list[Frame]

    def inputs(self) -> list[Arrays]:
        """The inputs of each frame; the previous BEV is the one that onnxruntime computed."""
        return [step.inputs for step in run_stream(detectors.stream(self.config.model), self.runner, self.frames)]


def drive(num_cameras: int, count: int) -> list[Frame]:
    """Consecutive frames of one scene with noise as images, from a vehicle that drives and turns."""
    first, second = noise_frames(DATA, num_cameras, IMAGE_HW)
    step = second.can_bus - first.can_bus
    return [
        dataclasses.replace(
            first if index % 2 == 0 else second,
            token=f"frame_{index}",
            timestamp_us=index * 500_000,
            can_bus=first.can_bus + index * step,
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def exported() -> tuple[Path, Config, list[Frame]]:
    """A small network as sealed ONNX, its config, and five frames."""
    config = from_dict(artifact.unseal(NETWORK, "onnx").config)
    return NETWORK, config, drive(config.model.num_cameras, 5)


@pytest.fixture
def rig(exported: tuple[Path, Config, list[Frame]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """An engine that can run here on the substitutes."""
    onnx_path, config, frames = exported
    cuda = HostCuda()
    trt = HostTensorRT(cuda, onnx_path)
    engine = sealed(tmp_path / "net.engine", config)
    monkeypatch.setattr(backend, "gpu", lambda: GPU)
    monkeypatch.setattr(backend, "cuda_runtime", lambda: cuda)
    monkeypatch.setattr(backend, "load", lambda name: Backend(name=name, module=trt, version="1.7.1"))
    return Rig(engine, cuda, trt, OnnxRunner(onnx_path), config, frames)


def sealed(path: Path, config: Config, **changes: object) -> Path:
    path.write_bytes(PLAN)
    facts = engine_facts(
        config.model.interface(IMAGE_HW),
        capabilities=("8.6", "8.9"),
        build=BuildOptions(onnx="net.onnx", memory_limit_mb=256, allow_float=True),
    )
    artifact.seal(path, config=to_dict(config), parent=None, facts=dataclasses.replace(facts, **changes))
    return path


def left(cuda: HostCuda) -> list[object]:
    """Memory, streams, events and graphs that were not freed."""
    return [*cuda.blocks, *cuda.pinned, *cuda.alive]


def streamed(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: inputs[name] for name in STREAMED}


def agree(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name])


def test_the_substitute_takes_as_many_arguments_as_cuda() -> None:
    ours = {name: function for name, function in vars(HostCuda).items() if name.startswith("cuda")}
    for name, function in ours.items():
        real = re.match(rf"{name}\((.*?)\)", getattr(runtime, name).__doc__)
        assert real is not None, name
        wanted = [part for part in real[1].split(",") if part.strip()]
        assert len(inspect.signature(function).parameters) - 1 == len(wanted), f"{name}: {real[0]}"


def test_a_stream_that_keeps_its_bev_on_the_gpu_equals_onnxruntime_with_the_bev_passed_by_hand(rig: Rig) -> None:
    with Session(rig.engine) as session:
        for inputs in rig.inputs():
            agree(session.infer(streamed(inputs)), rig.runner(inputs))
        np.testing.assert_array_equal(session.infer(rig.inputs()[0], ("bev",))["bev"], rig.runner(rig.inputs()[0])["bev"])


def test_a_given_previous_bev_counts_whatever_came_before(rig: Rig) -> None:
    given = rig.inputs()
    with Session(rig.engine) as session:
        for index in (3, 1, 4, 4, 0, 2):
            agree(session.infer(given[index]), rig.runner(given[index]))


def test_before_the_first_frame_the_history_is_zero(rig: Rig) -> None:
    inputs = rig.inputs()[0]
    with Session(rig.engine) as session:
        wanted = rig.runner({**inputs, "has_prev": np.ones(1, np.float32), "prev_bev": np.zeros_like(inputs["prev_bev"])})
        agree(session.infer({**streamed(inputs), "has_prev": np.ones(1, np.float32)}), wanted)


def test_the_compute_time_is_that_of_the_network_without_the_copies_around_it(rig: Rig) -> None:
    with Session(rig.engine) as session:
        for inputs in rig.inputs():
            before = rig.cuda.clock_ms
            session.infer(inputs)
            assert session.compute_ms() == NETWORK_MS
            assert rig.cuda.clock_ms - before == NETWORK_MS + COPY_MS * len({**inputs, **rig.runner.interface.outputs})


def test_after_the_first_frame_no_memory_is_allocated_and_no_kernel_is_started_by_hand(rig: Rig) -> None:
    """An allocation waits for all work on a real GPU, and kernels started one by one cost time on the host in every frame."""
    first, *others = rig.inputs()
    with Session(rig.engine) as session:
        session.infer(streamed(first), ("cls_logits", "box_code"))
        blocks, pinned, enqueued = set(rig.cuda.blocks), set(rig.cuda.pinned), rig.trt.enqueued
        for inputs in others:
            session.infer(streamed(inputs), ("cls_logits", "box_code"))
        assert (set(rig.cuda.blocks), set(rig.cuda.pinned)) == (blocks, pinned)
        assert rig.trt.enqueued == enqueued


def test_page_locked_memory_holds_only_the_tensors_that_leave_the_gpu(rig: Rig) -> None:
    tensors = {**rig.runner.interface.inputs, **rig.runner.interface.outputs}
    with Session(rig.engine) as session:
        for inputs in rig.inputs():
            session.infer(streamed(inputs), ("cls_logits", "box_code"))
        sizes = sorted(4 * int(np.prod(tensors[name])) for name in (*STREAMED, "cls_logits", "box_code"))
        assert sorted(map(len, rig.cuda.pinned.values())) == sizes


def test_results_stay_when_the_next_frame_comes(rig: Rig) -> None:
    first, second = rig.inputs()[:2]
    with Session(rig.engine) as session:
        found = session.infer(first)
        kept = {name: value.copy() for name, value in found.items()}
        session.infer(second)
        agree(found, kept)


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaHostAlloc", "cudaEventRecord", "cudaStreamSynchronize"])
def test_after_a_frame_that_failed_the_next_goes_on_from_the_last_good_one(rig: Rig, call: str) -> None:
    first, second = rig.inputs()[:2]
    with Session(rig.engine) as session:
        rig.cuda.fail[call] = FAILED
        with pytest.raises(EngineError, match="cudaErrorLaunchFailure"):
            session.infer(first)
        agree(session.infer(streamed(first)), rig.runner(first))
        rig.cuda.fail[call] = FAILED
        if call != "cudaHostAlloc":  # not taken again
            with pytest.raises(EngineError, match="cudaErrorLaunchFailure"):
                session.infer(streamed(rig.inputs()[4]))
        agree(session.infer(streamed(second)), rig.runner(second))


def test_a_frame_that_tensorrt_cannot_start_is_an_error_with_its_reason_and_the_memory(rig: Rig) -> None:
    first, second = rig.inputs()[:2]
    rig.cuda.capturable = False
    with Session(rig.engine) as session:
        session.infer(first)
        rig.trt.lost = 1
        with pytest.raises(
            EngineError, match=r"could not start the frame; .* MB of 1024\.0 MB of GPU memory are free.*\n  the kernel was lost"
        ):
            session.infer(streamed(second))
        agree(session.infer(streamed(second)), rig.runner(second))


def test_after_the_gpu_is_lost_every_frame_is_refused_without_a_call_to_cuda(rig: Rig) -> None:
    inputs = rig.inputs()[0]
    with Session(rig.engine) as session:
        rig.cuda.sticky = runtime.cudaError_t.cudaErrorIllegalAddress
        with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
            session.infer(inputs)
        rig.cuda.calls.clear()
        with pytest.raises(EngineError, match=r"left the GPU unusable for this process \(cudaErrorIllegalAddress\)"):
            session.infer(inputs)
        assert not rig.cuda.calls


def test_without_a_graph_the_kernels_start_one_by_one_and_a_warning_says_so(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.cuda.capturable = False
    with caplog.at_level(logging.WARNING, "engine.session"), Session(rig.engine) as session:
        for inputs in rig.inputs():
            agree(session.infer(streamed(inputs)), rig.runner(inputs))
    assert re.search(r"no CUDA graph \(.*cudaErrorStreamCaptureUnsupported\)", caplog.text)
    assert not left(rig.cuda)


def test_closing_frees_everything_and_the_session_can_be_opened_again(rig: Rig) -> None:
    session, inputs = Session(rig.engine), rig.inputs()[0]
    for _ in range(2):
        with session:
            agree(session.infer(inputs), rig.runner(inputs))
            assert left(rig.cuda)
        assert not left(rig.cuda)
        with pytest.raises(EngineError, match="is not open; use it in a with statement"):
            session.infer(inputs)


def test_everything_is_freed_whatever_fails_while_opening(rig: Rig) -> None:
    with Session(rig.engine):
        calls = [call for call in rig.cuda.calls if call in HostCuda.__dict__]
    assert {"cudaMalloc", "cudaMemset", "cudaStreamCreate", "cudaEventCreate", "cudaStreamBeginCapture"} < set(calls)
    for call in dict.fromkeys(calls):
        rig.cuda.fail[call] = FAILED
        try:
            with Session(rig.engine):
                assert call in ("cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy")  # which only cost the CUDA graph
        except EngineError as error:
            assert "cudaErrorLaunchFailure" in str(error)
        rig.cuda.fail.clear()
        assert not left(rig.cuda), call


@pytest.mark.parametrize(("limit", "purpose"), [(1 << 10, "images"), (302_000, "bev"), (306_000, "the layers' intermediate results")])
def test_too_little_memory_is_an_error_with_sizes_and_everything_is_freed(rig: Rig, limit: int, purpose: str) -> None:
    rig.cuda.limit = limit
    sizes = rf"net\.engine: no GPU memory for {purpose} \([\d.]+ MB\); [\d.]+ MB of [\d.]+ MB of GPU memory are free"
    with pytest.raises(EngineError, match=sizes), Session(rig.engine):
        pass
    assert not left(rig.cuda)
    rig.cuda.limit = 1 << 30
    with Session(rig.engine) as session:
        agree(session.infer(rig.inputs()[0]), rig.runner(rig.inputs()[0]))


def test_new_memory_is_zero_and_is_freed_with_its_owner(rig: Rig) -> None:
    with Buffers(rig.engine) as buffers:
        address, array = buffers.device("images", 100), buffers.pinned("bev", (2, 3), np.dtype(np.float32))
        assert bytes(rig.cuda.blocks[address]) == bytes(100)
        assert (array.shape, array.dtype) == ((2, 3), np.float32)
    assert not left(rig.cuda)


def test_an_engine_that_tensorrt_refuses_is_an_error_with_its_reason_and_the_command(rig: Rig) -> None:
    rig.trt.refused = "the plan is damaged"
    message = r"cannot open it;.*build it again: python -m engine\.build --onnx .*net\.onnx.*\n  the plan is damaged"
    with pytest.raises(EngineError, match=message), Session(rig.engine):
        pass
    assert not left(rig.cuda)


def test_wrong_tensors_are_refused_by_name_before_anything_is_copied(rig: Rig) -> None:
    inputs = rig.inputs()[0]
    with Session(rig.engine) as session:
        rig.cuda.calls.clear()
        for wrong, message in (
            (
                {**inputs, "can_bus": inputs["can_bus"].astype(np.float64)},
                r"can_bus is float64\(1, 18\), the engine takes float32\(1, 18\)",
            ),
            ({**inputs, "images": inputs["images"][:, :5]}, r"images is float32\(1, 5, 3, 64, 64\), the engine takes"),
            ({name: inputs[name] for name in ("images", "prev_bev")}, r"missing inputs: lidar2img, can_bus, has_prev"),
            ({**inputs, "img": inputs["images"]}, r"unknown names: img"),
        ):
            with pytest.raises(EngineError, match=message):
                session.infer(wrong)
        with pytest.raises(EngineError, match="unknown names: boxes"):
            session.infer(inputs, ("boxes",))
        assert not rig.cuda.calls
        assert rig.cuda.sticky == OK


def test_an_engine_of_another_gpu_is_refused_with_the_command_before_it_is_opened(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "gpu", lambda: Gpu(name="NVIDIA RTX 5090", compute_capability="12.0", bus_id=""))
    command = (
        rf"python -m engine\.build --onnx {rig.engine.parent}/net\.onnx --out {rig.engine} --backend tensorrt-rtx "
        r"--compute-capability 8\.6 8\.9 12\.0 --memory-limit 256 --allow-float"
    )
    message = rf"was built for GPUs of compute capability 8\.6, 8\.9; this is a NVIDIA RTX 5090 \(12\.0\)\. .*\n  {command}\Z"
    with pytest.raises(EngineError, match=message):
        Session(rig.engine)
    assert not rig.cuda.calls


def test_an_engine_of_another_version_is_refused_with_the_command_before_it_is_opened(rig: Rig) -> None:
    sealed(rig.engine, rig.config, backend={"name": "tensorrt-rtx", "version": "1.4.0"})
    message = r"built with tensorrt-rtx 1\.4\.0, installed is 1\.7\.1, .*\n  python -m engine\.build .*\n.*tensorrt-rtx==1\.4\.0\Z"
    with pytest.raises(EngineError, match=message):
        Session(rig.engine)
    assert not rig.cuda.calls


def test_the_streaming_detector_on_an_engine_finds_what_it_finds_in_onnxruntime(rig: Rig) -> None:
    wanted = StreamingDetector(rig.runner, rig.config, rig.runner.interface)
    with open_engine(rig.engine) as detector:
        for index, frame in enumerate(rig.frames):
            rig.cuda.fail["cudaMemcpyAsync"] = FAILED
            with pytest.raises(EngineError, match="cudaErrorLaunchFailure"):
                detector(frame)
            bad = dataclasses.replace(frame, images=frame.images * np.float32(np.nan))
            with pytest.raises(FrameError, match="NaN or infinite"):
                detector(bad)
            for ours, theirs in zip(detector(frame), wanted(frame), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            if index == 2:
                detector.reset()
                wanted.reset()
    assert not left(rig.cuda)


def test_without_trtexec_the_session_is_measured_in_the_same_form(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed(rig.engine, rig.config, plan_bytes=len(PLAN))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(bench, "_WARM_UP_MS", 0)
    monkeypatch.setattr(bench, "_HOST_RUNS", 3)
    bench.main(["--engine", str(rig.engine), "--iterations", "4"])
    found = json.loads(bench.report_path(rig.engine).read_text())
    assert (found["tool"], found["command"]) == ("session", f"python -m engine.bench --engine {rig.engine} --iterations 4")
    assert (found["compute"]["p50_ms"], found["compute"]["runs"]) == (NETWORK_MS, 4)
    assert 0 < found["with_transfers"]["p50_ms"] < found["with_host"]["p50_ms"]
    assert found["gpu"] == {"name": "Host", "compute_capability": "8.9"}
    assert not left(rig.cuda)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs an NVIDIA GPU: builds and runs a real engine")
def test_a_real_engine_streams_what_onnxruntime_computes_and_frees_its_memory(
    exported: tuple[Path, Config, list[Frame]], tmp_path: Path
) -> None:
    onnx_path, config, frames = exported
    build.build_file(onnx_path, tmp_path / "net.engine", build.Options())
    stream, runner = detectors.stream(config.model), OnnxRunner(onnx_path)
    with Session(tmp_path / "net.engine"):
        pass  # loads libraries that stay in memory
    _, free, _ = backend.cuda_runtime().cudaMemGetInfo()
    with Session(tmp_path / "net.engine") as session:
        for step in run_stream(stream, runner, frames):
            found = session.infer(streamed(step.inputs))
            assert session.compute_ms() > 0
            for name, value in found.items():
                np.testing.assert_allclose(value, step.outputs[name], atol=5e-2 * np.abs(step.outputs[name]).max())  # TF32 products
    assert abs(backend.cuda_runtime().cudaMemGetInfo()[1] - free) < 1 << 22
