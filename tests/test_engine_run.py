"""Running and measuring engines: checks that need no GPU, and tests on a GPU."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sealed_facts import engine_facts

from engine import backend, bench
from engine.backend import EngineError
from engine.session import Session
from qdbev import artifact
from qdbev.detectors.bevformer.config import BEVFormerConfig

NO_GPU = backend.gpu() is None
INTERFACE = BEVFormerConfig().interface((480, 800))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A sealed file that claims to be an engine, which is enough for all steps before running it."""
    path = tmp_path / "w8a8.engine"
    path.write_bytes(b"plan")
    artifact.seal(path, config={}, parent=None, facts=engine_facts(INTERFACE))
    return path


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_opening_an_engine_without_a_gpu_says_what_it_needs(engine: Path) -> None:
    with pytest.raises(
        EngineError, match=r"running .*w8a8\.engine needs an NVIDIA GPU with its driver.*Without a GPU: `python -m engine\.audit`"
    ):
        Session(engine)


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_measuring_without_a_gpu_says_what_it_needs_and_fails(engine: Path) -> None:
    command = [sys.executable, "-m", "engine.bench", "--engine", str(engine)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False, timeout=240)
    assert done.returncode != 0
    assert done.stderr.startswith("error: measuring ")
    assert "needs an NVIDIA GPU" in done.stderr
    assert not bench.report_path(engine).exists()


def test_a_changed_engine_is_refused_before_any_gpu_is_asked_for(engine: Path) -> None:
    engine.write_bytes(b"plam")
    with pytest.raises(artifact.ArtifactError, match="not the file that was sealed"):
        Session(engine)


def test_importing_the_engine_room_loads_no_tensorrt_and_no_cuda_of_its_own() -> None:
    code = (
        "import sys, torch; before = set(sys.modules);"  # torch looks for CUDA bindings by itself
        "import engine.audit, engine.bench, engine.build, engine.stream, engine.captured_context, engine.session;"
        "print([name for name in set(sys.modules) - before if name.split('.')[0] in ('tensorrt', 'tensorrt_rtx', 'cuda')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True, timeout=240
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs an NVIDIA GPU: builds and runs a real engine")
def test_the_bev_of_one_frame_is_the_previous_bev_of_the_next(tmp_path: Path) -> None:
    from test_engine_build import sampler

    from engine import build

    build.build_file(sampler(tmp_path / "s.onnx"), tmp_path / "s.engine", build.Options())
    with Session(tmp_path / "s.engine") as session:
        zeros = {name: np.zeros(session.shapes[name], session.dtypes[name]) for name in session.interface.inputs}
        first = session.infer(zeros)
        without = {name: value for name, value in zeros.items() if name != "prev_bev"}
        kept = session.infer(without)
        passed = session.infer({**without, "prev_bev": first["bev"]})
        np.testing.assert_array_equal(kept["bev"], passed["bev"])
        assert np.abs(first["bev"] - kept["bev"]).max() > 0


def test_a_session_is_loaded_without_torch():
    code = "import sys, engine.session; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True, timeout=240
    )
    assert done.stdout.strip() == "False"
