"""The GPU check runs its plan in real processes, keeps the results, and ends with one error where there is no GPU."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sealed_facts import engine_facts, onnx_facts
from small_checks import assert_gone, code, leaves, results

from bench import checks, gpu_check, gpu_engine, gpu_network
from bench.checks import Check, Result
from bench.gpu_check import STUDENTS, GpuCheckError, file_name, plan
from eval.comparison import ComparisonError
from eval.open_model import open_model
from plugins import torch_ops
from qdbev import artifact

ROOT = Path(__file__).parent.parent
H100 = {"name": "NVIDIA H100 80GB HBM3"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, whose modules a check can run by name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tests_are_counted_and_a_file_whose_tests_all_skip_is_a_skip(folder):
    tests = "import pytest\ndef test_a(): pass\n@pytest.mark.skip(reason='needs a GPU')\ndef test_b(): pass\n"
    Path("test_some.py").write_text(tests + "def test_c(): assert False\n")
    Path("test_none.py").write_text(tests.replace("def test_a", "@pytest.mark.skip(reason='needs a GPU')\ndef test_a"))

    def counted(name: str) -> Check:
        command = ("pytest", "-q", "-p", "no:cacheprovider", "--noconftest", f"--junitxml={name}.xml", f"{name}.py")
        return Check(name=name, command=command, limit_s=60, figures=Path(f"{name}.xml"), read=gpu_check.test_counts)

    found = results(counted("test_some"), counted("test_none"))
    assert found["test_some"].status == "failed"
    assert found["test_some"].figures == {
        "passed": ["test_some.test_a"],
        "failed": ["test_some.test_c"],
        "skipped": {"test_some.test_b": "needs a GPU"},
    }
    assert (found["test_none"].status, found["test_none"].reason) == ("skipped", "needs a GPU")


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in its background, which ignores interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_file_is_written_after_every_check_and_an_interrupted_run_keeps_it(folder, interrupts):
    code("interrupts", "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(30)")
    wanted = [leaves("first", {"ms": 1}), Check(name="second", command=("interrupts",), limit_s=20)]
    out = Path("results/nvidia-h100.json")
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check(wanted, H100, out, Path("work"), 60.0)
    content = json.loads(out.read_text())
    assert content["complete"] is False
    assert list(content["checks"]) == ["first"]
    assert content["checks"]["first"]["figures"] == {"ms": 1}
    assert content["gpu"] == H100
    assert {"commit", "torch", "utc"} <= set(content["made"])
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]
    gpu_check.check(wanted[:1], H100, out, Path("work"), 60.0)
    assert json.loads(out.read_text())["complete"] is True


def test_a_run_that_gets_sigterm_ends_the_running_check(folder):
    code(
        "waits", "import os, pathlib, time\npathlib.Path('p').write_text(str(os.getpid())); pathlib.Path('p').rename('pid')\ntime.sleep(60)"
    )
    Path("ends.py").write_text(
        "import signal\nfrom pathlib import Path\nfrom bench import gpu_check\nfrom bench.checks import Check\n"
        "signal.signal(signal.SIGTERM, gpu_check.end)\n"
        "gpu_check.check([Check(name='waits', command=('waits',), limit_s=50)], {}, Path('out.json'), Path('work'), 50)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "ends.py"], env=environment, stderr=subprocess.PIPE, text=True)
    while not Path("pid").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1].count("SIGTERM") == 1
    assert process.returncode == 1
    assert_gone(int(Path("pid").read_text()))


def test_a_failure_decides_the_exit_status_and_a_skip_does_not():
    results = {name: Result(status=name, command="", reason="why") for name in ("passed", "skipped", "failed")}
    gpu_check.require_passed({name: results[name] for name in ("passed", "skipped")}, Path("out.json"))
    with pytest.raises(GpuCheckError, match=r"^1 of 3 .*failed; .*out\.json"):
        gpu_check.require_passed(results, Path("out.json"))
    with pytest.raises(GpuCheckError, match=r"^no check .*out\.json"):
        gpu_check.require_passed({"skipped": results["skipped"]}, Path("out.json"))


LACKING = ("cv2", "nuscenes", "pyquaternion", "pytorch_quantization", "scipy", "matplotlib", "onnx", "onnxruntime", "rich")
"""Packages that a machine with a GPU may lack; the check of the kernels must not need them."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_and_optional_packages_there_is_one_error_and_nothing_is_written(tmp_path):
    text = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({LACKING!r}))\nimport bench.gpu_network, bench.kernels\n"
        "runpy.run_module('bench.gpu_check', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", text, "--out", "results"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1
    assert re.match("error: .*NVIDIA GPU", done.stderr) and len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_comparing_a_network_without_a_gpu_says_what_it_needs(folder):
    with pytest.raises(SystemExit, match="^error: .*needs an NVIDIA GPU"):
        gpu_network.main(["--out", "network.json"])
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100_2026-11-21.json"),
        ("NVIDIA H200", "nvidia-h200_2026-11-21.json"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4_2026-11-21.json"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090_2026-11-21.json"),
    ],
)
def test_the_file_is_named_after_the_gpu_and_the_day(name, file):
    assert file_name(name, "2026-11-21") == file


def test_every_command_of_the_plan_exists_and_takes_its_options(folder):
    modules = {}
    for check in plan(Path("runs/demo"), Path("work")):
        modules.setdefault(check.command[0], set()).update(part for part in check.command if part.startswith("--"))
    modules.pop("pytest")
    for module, options in modules.items():
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        named = {option for option in options if f'"{option}"' in source}
        added = {"--set": "add_settings(parser)", "--device": "add_device(parser)"} | (
            dict.fromkeys(("--device", "--model", "--out"), "model_parser(") if module == "eval.engine_eval" else {}
        )
        assert all(added.get(option, "absent") in source for option in options - named), module


def test_the_plan_begins_with_the_kernels_and_names_only_what_comes_before(folder):
    found = plan(Path("runs/demo"), Path("work"))
    names = [check.name for check in found]
    assert names[:4] == ["kernels", "operators", "network_float", "network_w8a8"]
    assert len(set(names)) == len(names)
    for index, check in enumerate(found):
        assert set(check.after) <= set(names[:index])
    assert [check.name for check in found if check.may_be_refused] == ["tensorrt_rtx_bench"]


def test_the_tests_of_the_plan_are_those_marked_for_a_gpu_or_tensorrt(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = {check.name: [part for part in check.command if part.startswith("tests/")] for check in plan(Path("none"), Path("nowhere"))}
    assert found["operators"] == ["tests/test_plugins_gpu.py"]
    expected = {f"tests/test_{name}.py" for name in ("engine_run", "engine_session", "export_deform_conv", "export_float16")}
    assert expected <= set(found["engines"])
    assert not {"tests/test_plugins_gpu.py", "tests/test_layers.py", "tests/test_bench_gpu_check.py"} & set(found["engines"])


def test_the_plan_works_on_copies_of_the_models_of_a_run(folder):
    run = Path("runs/demo")
    run.mkdir(parents=True)
    for name in ("w8a8.pt", "w8a8.onnx", "w8a8.engine"):
        (run / name).write_text(name)
    artifact.seal(run / "w8a8.onnx", config={"data": {"root": "data/micro"}}, parent=None, facts=onnx_facts())
    found = {check.name: check for check in plan(run, Path("work"))}
    assert sorted(path.name for path in Path("work/run").iterdir()) == ["w8a8.onnx", "w8a8.onnx.seal.json", "w8a8.pt"]
    assert found["w8a8_nds"].files == (Path("data/micro"),)
    assert found["w8a8_build"].command[2:5] == ("work/run/w8a8.onnx", "--out", "work/run/w8a8.engine")
    passed = {name: Result(status="passed", command="") for name in found}
    assert checks.lacks(dataclasses.replace(found["w8a8_build"], packages=()), passed) == ""
    assert "runs/demo/w4a6.onnx" in checks.lacks(dataclasses.replace(found["w4a6_build"], packages=()), passed)
    assert {f"{name}_nds" for name in STUDENTS} <= set(found)


def test_scores_are_kept_without_the_rows_of_every_frame(folder):
    Path("compared.json").write_text(json.dumps({"models": {"a": {"nds": 0.4}}, "rows": [{"passed": False}], "made": {}}))
    assert gpu_check.read_scores(Path("compared.json")) == {"models": {"a": {"nds": 0.4}}}


@pytest.mark.parametrize("bits", ["float", "w8a8"])
def test_a_network_compared_with_itself_passes_and_a_changed_one_does_not(bits, tmp_path):
    config, deployed = gpu_network.network(bits)
    rows = gpu_network.differences(config, deployed, torch.device("cpu"), gpu_network.FLOAT_DISTANCE)
    assert {(row.model, row.reference) for row in rows} == {("pytorch_cpu", "cpu"), ("kernels_cpu", "pytorch_cpu")}
    assert {row.distance for row in rows} == {0.0} and len(rows) == 2 * 2 * 3
    gpu_network.save(rows, tmp_path / "same.json")
    tensors = json.loads((tmp_path / "same.json").read_text())["tensors"]
    assert [(row["tensor"], row["passed"]) for row in tensors] == [(name, True) for name in ("bev", "cls_logits", "box_code")] * 2
    with pytest.raises(ComparisonError, match="kernels_cpu .*pytorch_cpu.* bev of frame 0"):
        gpu_network.save([*rows[:6], rows[6]._replace(distance=0.01), *rows[7:]], tmp_path / "other.json")
    tensors = json.loads((tmp_path / "other.json").read_text())["tensors"]
    assert [row["passed"] for row in tensors] == [True, True, True, False, True, True]


def test_only_the_side_of_the_kernels_calls_the_operator(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "qdbev.ops.sca.run_operator", lambda *tensors: asked.append(torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )
    config, deployed = gpu_network.network("float")
    gpu_network.differences(config, deployed, torch.device("cpu"), 1.0)
    layers = config.model.encoder_layers
    # A pair runs side by side, layer after layer, two frames: the CPU asks for no gradient, PyTorch on the device does, the kernels do not.
    assert asked == ([False] * layers + [True] * layers) * 2 + ([True] * layers + [False] * layers) * 2


def test_random_weights_move_sampling_points():
    _, deployed = gpu_network.network("float")
    moving = [value for name, value in deployed.named_parameters() if name.endswith("sampling_offsets.weight")]
    assert moving and all(value.abs().min() < value.abs().max() for value in moving)


class AskedError(Exception):
    """Raised by the test instead of installing the kernels."""


def test_a_checkpoint_runs_the_kernels_on_a_gpu_and_only_there(monkeypatch, tmp_path):
    def install() -> None:
        raise AskedError

    monkeypatch.setattr(torch_ops, "install", install)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AskedError), open_model(tmp_path / "net.pt", "cuda"):
        pass
    with pytest.raises(artifact.ArtifactError, match="does not exist"), open_model(tmp_path / "net.pt", "cpu"):
        pass


def test_an_engine_of_another_onnx_is_not_compared(monkeypatch):
    opened = []

    class Opened:
        def __init__(self, path, device=None):
            self.seal = artifact.Seal(kind="engine", config={}, parent="0" * 64, facts=engine_facts(), provenance={}, sha256="1" * 64)
            opened.append(path.name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(gpu_engine, "open_model", Opened)
    with pytest.raises(artifact.ArtifactError, match=r"net\.engine was made from 000000000000, not from net\.onnx"):
        gpu_engine.differences(Path("net.engine"), Path("net.onnx"))
    assert opened == ["net.onnx", "net.engine"]
