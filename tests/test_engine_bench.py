"""The measurement of engines without a GPU: its figures, and how it calls trtexec and nvidia-smi and reads their output."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sealed_facts import engine_facts
from small_networks import exported_network

from engine import backend, bench, clocks, typical_frame
from engine.backend import EngineError, Gpu
from qdbev import artifact
from qdbev.artifact import Seal
from qdbev.config import to_dict
from qdbev.geometry import pillar_points, project

IMAGES = (6, 3, 64, 96)
INTERFACE = exported_network().model.interface((64, 96))
DEVICE = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", bus_id="00000000:1E:00.0")
# As trtexec writes them (samples/common/sampleReporting.cpp of TensorRT 8.6 to 11.1).
TIMES = """[
  { "startEnqMs" : 0.1, "endEnqMs" : 0.2, "startH2dMs" : 0.1, "endH2dMs" : 0.35, "startComputeMs" : 0.35, "endComputeMs" : 4.35, \
"startD2hMs" : 4.35, "endD2hMs" : 4.6, "h2dMs" : 0.25, "computeMs" : 4, "d2hMs" : 0.25, "latencyMs" : 4.5 }
, { "startEnqMs" : 5.1, "endEnqMs" : 5.2, "startH2dMs" : 5.1, "endH2dMs" : 5.4, "startComputeMs" : 5.4, "endComputeMs" : 11.4, \
"startD2hMs" : 11.4, "endD2hMs" : 11.6, "h2dMs" : 0.3, "computeMs" : 6, "d2hMs" : 0.2, "latencyMs" : 6.5 }
]
"""
SMI = "1980, 2619, 1980, 2619, 41, 353.62, 4513"


def engine(folder: Path, version: str = "10.13.3.9") -> tuple[Path, Seal]:
    """A sealed file that claims to be an engine for `DEVICE`."""
    path = folder / "net.engine"
    path.write_bytes(b"plan")
    config = exported_network()
    facts = engine_facts(config.model.interface(IMAGES[-2:]), ("tensorrt", version), ("9.0",), DEVICE.name)
    return path, artifact.seal(path, config=to_dict(config), parent=None, facts=facts)


def on_path(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program of that name first on PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin" / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_percentiles_and_throughput_are_of_the_times_given() -> None:
    found = bench.statistics([1.0] * 98 + [3.0, 10.0])
    assert found["p50_ms"] == 1.0
    assert found["p90_ms"] == 1.0
    assert found["p99_ms"] == pytest.approx(3.07)  # linear between the 99th and the 100th of 100 times
    assert found["p99_9_ms"] == pytest.approx(9.307)
    assert found["frames_per_s"] == pytest.approx(1000 / 1.11)
    assert found["runs"] == 100
    with pytest.raises(EngineError, match="no frame was measured; use more --iterations"):
        bench.statistics([])


def test_the_times_of_trtexec_are_read_and_anything_else_is_refused() -> None:
    assert bench.read_times(TIMES) == ([4.0, 6.0], [4.5, 6.5])
    for text in ("", "[{}]", '{"computeMs": 1}', "[1]"):
        with pytest.raises(EngineError, match="trtexec's times cannot be read"):
            bench.read_times(text)


@pytest.mark.parametrize(("version", "asks"), [("10.13.3.9", False), ("11.0.0", True), ("11.4.0.106", True)])
def test_trtexec_copies_inputs_and_outputs_whatever_its_version(tmp_path: Path, version: str, asks: bool) -> None:
    path, seal = engine(tmp_path, version)
    command = bench.tool_command("trtexec", path, seal, 10, tmp_path)
    assert ("--includeDataTransfers" in command) == asks
    assert "--noDataTransfers" not in command
    assert f"--loadInputs={','.join(f'{name}:{tmp_path}/{name}.bin' for name in INTERFACE.inputs)}" in command
    assert {"--iterations=10", "--duration=0", "--exposeDMA", "--useCudaGraph"} < set(command)


def test_with_trtexec_on_path_the_report_is_its_times_and_ours_around_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = engine(tmp_path)
    (tmp_path / "times").write_text(TIMES)
    script = f"""echo "$@" > {tmp_path}/asked
for argument; do case $argument in
  --exportTimes=*) cp {tmp_path}/times "${{argument#--exportTimes=}}" ;;
  --loadInputs=*) for part in $(echo "${{argument#--loadInputs=}}" | tr , ' '); do wc -c < "${{part#*:}}" >> {tmp_path}/sizes; done ;;
esac; done"""
    on_path(tmp_path, "trtexec", script, monkeypatch)
    on_path(tmp_path, "nvidia-smi", f"echo '{SMI}'", monkeypatch)
    monkeypatch.setattr(backend, "gpu", lambda: DEVICE)
    monkeypatch.setattr(bench, "_HOST_RUNS", 5)
    bench.main(["--engine", str(path), "--iterations", "2"])
    found = json.loads(bench.report_path(path).read_text())
    assert found["tool"] == "trtexec"
    assert found["command"].endswith((tmp_path / "asked").read_text().strip())
    sizes = [4 * int(np.prod(shape)) for shape in ((1, *IMAGES), (1, 6, 4, 4), (1, 18), (1, 64, 32), (1,))]
    assert list(map(int, (tmp_path / "sizes").read_text().split())) == sizes
    assert (found["compute"]["p50_ms"], found["with_transfers"]["p50_ms"]) == (5.0, 5.5)
    assert found["with_host"]["p50_ms"] > 5.5
    assert found["gpu"]["name"] == DEVICE.name
    assert found["gpu"]["clocks.sm"] == 1980
    assert found["engine"]["version"] == "10.13.3.9"
    assert found["made"]["torch"]


def test_the_work_around_the_engine_is_added_frame_by_frame(tmp_path: Path) -> None:
    path, seal = engine(tmp_path)
    times = bench.Times([4.0] * 6, [5.0] * 6, "trtexec", "trtexec --loadEngine")
    host = {"before": [1.0, 2.0, 3.0], "after": [10.0, 20.0], "camera_hw": [64, 96]}
    found = bench.report(path, seal, {"gpu": {}}, times, host)
    added = [16.0, 27.0, 18.0, 26.0, 17.0, 28.0]  # the few host times repeat
    assert found["with_host"] == bench.statistics(added)
    assert found["with_transfers"] == bench.statistics([5.0] * 6)
    assert found["host"]["before"]["p50_ms"] == 2.0


def test_a_trtexec_that_fails_is_an_error_with_the_end_of_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = engine(tmp_path)
    on_path(tmp_path, "trtexec", "echo starting; echo 'Error: plan of another version' >&2; exit 3", monkeypatch)
    monkeypatch.setattr(backend, "gpu", lambda: DEVICE)
    with pytest.raises(
        SystemExit, match=r"^error: `.*trtexec --loadEngine=.*` ended with 3:\n  starting\n  Error: plan of another version$"
    ):
        bench.main(["--engine", str(path)])
    assert not bench.report_path(path).exists()


def test_a_trtexec_that_never_ends_is_ended_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = engine(tmp_path)
    on_path(tmp_path, "trtexec", "exec sleep 60", monkeypatch)
    monkeypatch.setattr(backend, "gpu", lambda: DEVICE)
    monkeypatch.setattr(bench, "_TOOL_LIMIT_S", 0.5)
    started = time.monotonic()
    with pytest.raises(SystemExit, match="trtexec .*took more than 0 s; use fewer --iterations"):
        bench.main(["--engine", str(path)])
    assert time.monotonic() - started < 30


def test_an_engine_of_another_gpu_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = engine(tmp_path)
    on_path(tmp_path, "trtexec", f"touch {tmp_path}/ran", monkeypatch)
    monkeypatch.setattr(backend, "gpu", lambda: Gpu(name="NVIDIA L4", compute_capability="8.9", bus_id=""))
    with pytest.raises(SystemExit, match=r"was built for the NVIDIA H100 80GB HBM3 \(9\.0\); this is a NVIDIA L4 \(8\.9\)"):
        bench.main(["--engine", str(path)])
    assert not (tmp_path / "ran").exists()


def test_the_output_of_nvidia_smi_is_read_line_by_line() -> None:
    samples = clocks.parse(f"{SMI}\n1200, 2619, 1980, 2619, [N/A], [Not Supported], 9000\n1980, 26")
    assert samples[0]["power.draw"] == 353.62
    assert samples[1] == {"clocks.sm": 1200, "clocks.mem": 2619, "clocks.max.sm": 1980, "clocks.max.mem": 2619, "memory.used": 9000}
    assert len(samples) == 2  # the last was cut short
    before = clocks.parse("345, 2619, 1980, 2619, 30, 70.1, 500")
    found = clocks.summary(before, samples)
    assert (found["clocks.sm"], found["clocks.sm.min"], found["temperature.gpu"]) == (1590, 1200, 41)
    assert found["memory_mb"] == 8500
    assert clocks.summary([], []) == {}


def test_clocks_are_watched_while_something_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""echo "$@" >> {tmp_path}/asked
case "$*" in *loop-ms*) while true; do echo '{SMI}'; sleep 0.01; done ;; *) echo '345, 2619, 1980, 2619, 30, 70.1, 500' ;; esac"""
    on_path(tmp_path, "nvidia-smi", script, monkeypatch)
    with clocks.watch(DEVICE.bus_id) as seen:
        for _ in range(1000):
            if (tmp_path / "asked").read_text().count("\n") == 2:
                break
            time.sleep(0.01)
        time.sleep(0.2)
    assert seen["clocks.sm"] == 1980
    assert seen["memory_mb"] == 4013
    assert f"-i {DEVICE.bus_id}" in (tmp_path / "asked").read_text()


def test_an_nvidia_smi_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = "trap '' TERM; while true; do sleep 1; done"
    monkeypatch.setattr(clocks, "_LIMIT_S", 0.5)
    for script in (hang, f"case \"$*\" in *loop-ms*) {hang} ;; *) echo '{SMI}' ;; esac"):
        on_path(tmp_path, "nvidia-smi", script, monkeypatch)
        started = time.monotonic()
        with clocks.watch("") as seen:
            pass
        assert time.monotonic() - started < 30
        assert seen == {}


def test_without_nvidia_smi_nothing_is_recorded_about_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with clocks.watch("") as seen:
        pass
    assert seen == {}


def test_host_work_is_measured_on_images_that_the_network_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_HOST_RUNS", 3)
    found = bench.host_times(exported_network(), INTERFACE)
    assert len(found["before"]) == len(found["after"]) == 3
    assert min(found["before"] + found["after"]) > 0
    scale = exported_network().data.image_scale
    assert [int(side * scale) for side in found["camera_hw"]] == [64, 96]


def test_the_measured_frame_is_seen_by_as_many_cameras_as_one_of_nuscenes() -> None:
    config = exported_network(bev_hw=(50, 50))
    model = config.model
    frame = typical_frame.typical_inputs(config, model.interface((480, 800)))
    assert {name: value.shape for name, value in frame.items()} == {
        "images": (1, 6, 3, 480, 800),
        "lidar2img": (1, 6, 4, 4),
        "can_bus": (1, 18),
        "prev_bev": (1, 2500, model.embed_dim),
        "has_prev": (1,),
    }
    assert all(value.dtype == np.float32 for value in frame.values())
    points = pillar_points(model.bev_hw, model.num_pillar_points, model.pc_range)
    _, hit = project(points, torch.from_numpy(frame["lidar2img"]), (480, 800))
    cameras = hit.any(-1).sum(1).float()
    assert 1.0 < cameras.mean() < 1.4
