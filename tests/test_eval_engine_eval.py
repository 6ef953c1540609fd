"""An engine is scored and compared with its ONNX and its checkpoint on a small synthetic world (the engine runs on host_cuda.py)."""

import dataclasses
import json
import re
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from sealed_facts import engine_facts
from small_networks import DATA, exported_network

from engine import backend
from engine.backend import Backend, Gpu
from eval import comparison, engine_eval
from eval.comparison import DISTANCE, ComparisonError, TensorDifference
from eval.loop import FramesInOrder
from eval.nds import EvaluationError
from eval.open_model import OpenModel
from export import to_onnx
from qdbev import artifact
from qdbev.config import Config, to_dict
from qdbev.data.dataset import FrameDataset
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Arrays
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.facts import TeacherFacts
from qdbev.frames import open_frames
from qdbev.schema import Frame


@pytest.fixture(scope="module")
def config(tiny_world: Path) -> Config:
    small = exported_network()
    return dataclasses.replace(small, data=dataclasses.replace(small.data, root=str(tiny_world)))


@pytest.fixture(scope="module")
def dataset(config: Config) -> FrameDataset:
    return open_frames(config, "val")


@pytest.fixture(scope="module")
def made(config: Config, dataset: FrameDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.pt of random weights, and net.onnx made from it."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = BEVFormer(config.model).eval()
    weights = model.state_dict()
    artifact.save_checkpoint(folder / "net.pt", config=to_dict(config), weights=weights, parent=None, facts=TeacherFacts())
    parent, *_ = artifact.load_checkpoint(folder / "net.pt", "teacher")
    to_onnx.export(
        model,
        parent,
        folder / "net.onnx",
        dataset.transform.padded_hw,
        noise_frames(DATA, model.config.num_cameras, dataset.transform.padded_hw),
    )
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def command(*arguments: object) -> None:
    engine_eval.main([str(argument) for argument in arguments])


def reseal(path: Path, model: onnx.ModelProto) -> None:
    """Replace an ONNX by another model, with a seal as if it had been exported from the same checkpoint."""
    made = artifact.unseal(path, "onnx")
    parent = dataclasses.replace(made, sha256=made.parent or "")
    onnx.save(model, path)
    artifact.seal(path, config=made.config, parent=parent, facts=made.facts)


def test_an_onnx_and_its_checkpoint_are_scored_and_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("--model", run / "net.onnx")
    found = json.loads((run / "eval" / "net_onnx_compared.json").read_text())
    assert list(found["models"]) == ["net.pt", "net.onnx"]
    for name, scores in found["models"].items():
        metrics = json.loads((run / "eval" / name.replace(".", "_") / "metrics.json").read_text())  # of eval.run
        assert {key: metrics[key] for key in scores} == scores
        assert metrics["sha256"] == artifact.sha256(run / name)
    assert [(row["frame"], row["tensor"]) for row in found["rows"][:4]] == [(0, "bev"), (0, "cls_logits"), (0, "box_code"), (1, "bev")]
    assert len(found["rows"]) == 3 * found["compared_frames"] == 12
    assert min(row["cosine"] for row in found["rows"]) > 0.999999
    assert found["first_difference"] is None
    shown = capsys.readouterr().out
    assert re.search(r"nds +\d\.\d{4} +\d\.\d{4}", shown)
    assert re.search(r"net\.onnx +net\.pt +bev +1\.000000", shown)


def test_an_engine_is_a_third_column_and_is_compared_with_its_onnx(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: pip install -r requirements.txt")
    from host_cuda import PLAN, HostCuda, HostTensorRT

    cuda = HostCuda()
    trt = HostTensorRT(cuda, run / "net.onnx")
    monkeypatch.setattr(backend, "gpu", lambda: Gpu(name="Host", compute_capability="8.9", bus_id=""))
    monkeypatch.setattr(backend, "cuda_runtime", lambda: cuda)
    monkeypatch.setattr(backend, "load", lambda name: Backend(name=name, module=trt, version="1.7.1"))
    parent = artifact.unseal(run / "net.onnx", "onnx")
    (run / "net.engine").write_bytes(PLAN)
    facts = engine_facts(parent.facts.interface, capabilities=None)
    artifact.seal(run / "net.engine", config=parent.config, parent=parent, facts=facts)
    command("--model", run / "net.engine")
    found = json.loads((run / "eval" / "net_engine_compared.json").read_text())
    assert list(found["models"]) == ["net.pt", "net.onnx", "net.engine"]
    assert found["models"]["net.engine"] == found["models"]["net.onnx"]
    assert {(row["model"], row["reference"]) for row in found["rows"]} == {("net.onnx", "net.pt"), ("net.engine", "net.onnx")}
    assert {row["max_abs"] for row in found["rows"] if row["model"] == "net.engine"} == {0.0}
    assert not [*cuda.blocks, *cuda.pinned, *cuda.alive]


@pytest.mark.parametrize(
    ("layer", "tensor"),
    [("encoder.layers.0.ffn.linear2", "bev"), ("head.cls_branches.0.6", "cls_logits"), ("head.reg_branches.0.4", "box_code")],
)
def test_the_first_tensor_out_of_tolerance_is_named_and_the_comparison_is_kept(run: Path, layer: str, tensor: str) -> None:
    model = onnx.load(run / "net.onnx")
    (weight,) = (node.input[1] for node in model.graph.node if node.name == layer)
    for item in model.graph.initializer:
        if item.name == weight:
            values = np.random.default_rng(0).permuted(numpy_helper.to_array(item), axis=0)
            item.CopyFrom(numpy_helper.from_array(values, item.name))
    reseal(run / "net.onnx", model)
    message = rf"^error: net\.onnx .*net\.pt.* {tensor} of frame 0 \(\w+\), cosine [-\d.]+"
    with pytest.raises(SystemExit, match=message):
        command("--model", run / "net.onnx")
    found = json.loads((run / "eval" / "net_onnx_compared.json").read_text())
    assert found["first_difference"]["tensor"] == tensor


def recorder(config: Config, seen: list[Arrays], bev: float, poison: bool = False) -> OpenModel:
    """A model that appends its inputs to `seen` and whose outputs are `bev` everywhere; `poison` puts a NaN into the second frame."""
    outputs_of = config.model.interface((96, 160)).outputs

    def run(inputs: Arrays) -> Arrays:
        seen.append(inputs)
        outputs = {name: np.full(shape, bev, np.float32) for name, shape in outputs_of.items()}
        if poison and len(seen) == 2:
            outputs["box_code"][0, 0, 0] = np.nan
        return outputs

    return OpenModel(config, run)


def test_models_are_compared_on_the_inputs_and_the_history_of_the_reference(config: Config, dataset: FrameDataset) -> None:
    first, second = [], []
    models = [("a", recorder(config, first, 1.0)), ("b", recorder(config, second, 1.01))]
    rows = list(comparison.compare(models, FramesInOrder(dataset)))
    assert len(first) == len(second) == 4
    for ours, theirs in zip(first, second, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert second[1]["prev_bev"].max() == 1.0
    assert {row.passed for row in rows} == {True}


def test_a_wrong_scale_and_a_difference_count_and_nan_is_an_error(config: Config, dataset: FrameDataset) -> None:
    one, scaled = (recorder(config, [], bev) for bev in (1.0, 1.5))
    rows = list(comparison.compare([("a", one), ("b", scaled)], FramesInOrder(dataset)))
    assert (rows[0].cosine, rows[0].distance, rows[0].max_abs) == (pytest.approx(1.0), pytest.approx(0.5), 0.5)
    assert not rows[0].passed
    with pytest.raises(ComparisonError, match=r"^b: 1 of 120 values of box_code in frame 1 are NaN or infinite"):
        list(comparison.compare([("a", recorder(config, [], 1.0)), ("b", recorder(config, [], 1.0, poison=True))], FramesInOrder(dataset)))
    zero, ones = np.zeros(3), np.ones(3)
    assert comparison.figures(zero, zero) == (1.0, 0.0, 0.0)
    assert comparison.figures(zero, ones) == comparison.figures(ones, zero) == (0.0, 1.0, 1.0)
    assert comparison.figures(ones, -ones)[0] == pytest.approx(-1.0)


def scored(**nds: float) -> dict[str, object]:
    return {"rows": [], "models": {name.replace("_", "."): {"nds": value} for name, value in nds.items()}}


def test_an_engine_must_score_what_its_onnx_scores() -> None:
    engine_eval.require_same(scored(net_pt=0.4, net_onnx=0.41, net_engine=0.4081))  # an ONNX was compared when it was exported
    with pytest.raises(ComparisonError, match=r"net\.engine .*0\.4121.* net\.onnx .*0\.4100.* 0\.0021 .*0\.002\b"):
        engine_eval.require_same(scored(net_pt=0.4, net_onnx=0.41, net_engine=0.4121))


def test_the_caller_chooses_the_allowed_distance(config: Config, dataset: FrameDataset) -> None:
    def passed(bev: float, **allowed: float) -> bool:
        models = [("a", recorder(config, [], 1.0)), ("b", recorder(config, [], bev))]
        return next(comparison.compare(models, FramesInOrder(dataset), **allowed)).passed

    assert passed(1.04) and not passed(1.05)
    assert passed(1.009, allowed=0.01) and not passed(1.011, allowed=0.01)


def test_files_that_do_not_belong_together_are_refused_before_any_frame(run: Path) -> None:
    with pytest.raises(EvaluationError, match=r"net\.pt .*\.engine.*\.onnx"):
        engine_eval.family(run / "net.pt")
    with pytest.raises(EvaluationError, match=r"net\.engine"):
        engine_eval.family(run / "net.engine")
    parent, weights, _ = artifact.load_checkpoint(run / "net.pt", "teacher")
    artifact.save_checkpoint(run / "net.pt", config=parent.config, weights=weights, parent=None, facts=TeacherFacts(steps=1))
    with pytest.raises(SystemExit, match=r"net\.onnx .*net\.pt"):
        command("--model", run / "net.onnx")
    assert not (run / "eval").exists()


class CountedFrames:
    """A dataset of frames of noise that counts how many of its frames exist at the same time."""

    def __init__(self, config: Config, count: int) -> None:
        self._first, self._second = noise_frames(config.data, config.model.num_cameras, (96, 160))
        self._count = count
        self._alive = self.most = 0

    def __len__(self) -> int:
        return self._count

    def frame(self, index: int) -> Frame:
        frame = dataclasses.replace(self._second, timestamp_us=index, can_bus=self._first.can_bus + index)
        self._alive += 1
        self.most = max(self.most, self._alive)
        weakref.finalize(frame, self._forget)
        return frame

    def _forget(self) -> None:
        self._alive -= 1


def test_a_comparison_of_many_frames_keeps_only_a_few_in_memory(config: Config) -> None:
    """At the size of base a frame of images takes 107 MB, so that 40 frames at once would take 4 GB."""
    frames = CountedFrames(config, 40)
    models = [("a", recorder(config, [], 1.0)), ("b", recorder(config, [], 1.0))]
    rows = list(comparison.compare(models, FramesInOrder(frames, 40)))
    assert len({row.frame for row in rows}) == 40
    assert frames.most <= 3


def test_the_tolerance_of_a_row_is_a_distance_and_its_cosine():
    row = TensorDifference("b", "a", 0, "t", "bev", cosine=0.9991, distance=0.04, max_abs=1.0, allowed=DISTANCE)
    assert row.passed and row.least_cosine == pytest.approx(0.999)
    assert not row._replace(cosine=0.9989).passed
    assert not row._replace(distance=0.045).passed
