"""Packing a student into a file and restoring it, and exporting quantized embeddings."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from small_networks import DATA, IMAGE_HW, OUTPUTS, exported_network, first_inputs

from export import pack as packing
from export import parity, to_onnx
from export.runner import OnnxRunner
from qdbev import artifact
from qdbev.artifact import ArtifactError, Seal
from qdbev.config import Config, from_dict, to_dict
from qdbev.data.noise_frames import noise_frames
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.facts import StudentFacts, TeacherFacts
from qdbev.quant.calibrate import calibrate
from qdbev.quant.layers import QuantEmbedding, quant_layers
from qdbev.quant.pack import packed_parts, round_floats_to_half
from qdbev.recipes import at_bits
from qdbev.restore import quantized, restore


def small_config(**quant: object) -> Config:
    config = at_bits(exported_network(decoder_layers=2), "w4a6")
    return dataclasses.replace(config, quant=dataclasses.replace(config.quant, **{"embedding_bits": 4, **quant}))


def saved_student(path: Path, **quant: object) -> tuple[Seal, BEVFormer]:
    """A sealed and restored student with random weights, its floats rounded to float16; no projection is zero."""
    torch.manual_seed(0)
    config = small_config(**quant)
    model = BEVFormer(config.model).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            torch.nn.init.normal_(parameter, std=0.05)
    model = quantized(config, model)
    frames = noise_frames(DATA, model.config.num_cameras, IMAGE_HW)
    calibrate(model, lambda: packing._outputs(model, frames), "max")
    round_floats_to_half(model)
    facts = StudentFacts(image_hw=IMAGE_HW, steps=7)
    artifact.save_checkpoint(path, config=to_dict(config), weights=model.state_dict(), parent=None, facts=facts)
    return restore(path)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seal, BEVFormer, Path]:
    path = tmp_path_factory.mktemp("student") / "w4a6.pt"
    return *saved_student(path, range_mode="clip"), path


@pytest.mark.parametrize(("scale", "per_channel"), [("fixed", True), ("clip", True), ("step", False)])
def test_a_packed_file_gives_the_students_outputs_to_the_bit(scale: str, per_channel: bool, tmp_path: Path) -> None:
    seal, model = saved_student(tmp_path / "student.pt", range_mode=scale, per_channel=per_channel)
    packing.write(model, seal, tmp_path / "student.packed.pt")
    _, restored = restore(tmp_path / "student.packed.pt")
    brighter = dataclasses.replace(DATA, std=(28.5,) * 3)
    frames = noise_frames(brighter, model.config.num_cameras, IMAGE_HW)
    ours, theirs = packing._outputs(model, frames), packing._outputs(restored, frames)
    assert len(ours) == 2 * len(OUTPUTS)
    assert all(np.array_equal(first, second) for first, second in zip(ours, theirs, strict=True))
    assert not np.array_equal(ours[3], packing._outputs(model, frames[1:])[0])  # the second frame saw the first one's BEV


def test_the_command_writes_a_sealed_file_and_reports_both_counts(student, tmp_path, monkeypatch, capsys):
    seal, model, path = student
    packed = tmp_path / "w4a6.packed.pt"
    monkeypatch.setattr("sys.argv", ["pack", "--student", str(path), "--packed", str(packed)])
    packing.main()
    found, restored = restore(packed)
    assert found.kind == "packed"
    assert found.parent == artifact.sha256(path)
    assert from_dict(found.config) == from_dict(seal.config)
    assert found.facts.image_hw == IMAGE_HW
    assert found.facts.parts == packed_parts(model)
    assert found.facts.float_bytes == 8 * found.facts.paper_bytes
    assert 24 * found.facts.macs < found.facts.bops < 64 * found.facts.macs
    assert packed.stat().st_size < path.stat().st_size / 4
    printed = capsys.readouterr().out
    assert f"packed file {packed.stat().st_size} bytes" in printed
    assert f"the paper's count {found.facts.paper_bytes:.0f} bytes" in printed
    assert f"{found.facts.macs} multiply-accumulates, {found.facts.bops} bit operations" in printed
    assert not restored.training


def test_a_teacher_is_not_packed(tmp_path, monkeypatch):
    config = small_config()
    weights = BEVFormer(config.model).state_dict()
    artifact.save_checkpoint(tmp_path / "t.pt", config=to_dict(config), weights=weights, parent=None, facts=TeacherFacts())
    monkeypatch.setattr("sys.argv", ["pack", "--student", str(tmp_path / "t.pt"), "--packed", str(tmp_path / "p.pt")])
    with pytest.raises(SystemExit, match="is a teacher file, a student is needed"):
        packing.main()
    assert [file.name for file in tmp_path.iterdir()] == ["t.pt"]


def test_a_student_without_an_image_size_is_refused(student, tmp_path):
    seal, model, _ = student
    with pytest.raises(ArtifactError, match="does not say its image size"):
        packing.write(model, dataclasses.replace(seal, facts=StudentFacts()), tmp_path / "p.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_packed_form_that_computes_something_else_leaves_no_file(student, tmp_path, monkeypatch):
    seal, model, _ = student
    right = packing.pack

    def wrong(network):
        with torch.no_grad():
            network.head.reg_branches[0][0].bias[0] += 0.5
            try:
                return right(network)
            finally:
                network.head.reg_branches[0][0].bias[0] -= 0.5

    monkeypatch.setattr(packing, "pack", wrong)
    with pytest.raises(ArtifactError, match="does not give the student's outputs"):
        packing.write(model, seal, tmp_path / "w4a6.packed.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "drop", "other config"])
def test_a_damaged_packed_file_is_refused(student, tmp_path, damage):
    seal, model, _ = student
    path = tmp_path / "w4a6.packed.pt"
    packing.write(model, seal, path)
    found, weights, _ = artifact.load_checkpoint(path, "packed")
    config = found.config
    if damage == "flip":
        weights["packed"][len(weights["packed"]) // 2] ^= 1
    elif damage == "drop":
        weights = {}
    else:
        config = to_dict(small_config(embedding_bits=None))
    artifact.save_checkpoint(path, config=config, weights=weights, parent=None, facts=found.facts)
    with pytest.raises(ArtifactError, match="weights do not fit the checkpoint's own config"):
        restore(path)


@pytest.fixture(scope="module")
def exports(student, tmp_path_factory) -> dict[str, tuple[BEVFormer, Path]]:
    """Two students and their ONNX files: with 4-bit tables and clipped ranges, with 8-bit tables and one fixed step per weight.

    The first is exported from its packed form.
    """
    folder, (seal, model, _) = tmp_path_factory.mktemp("exports"), student
    packing.write(model, seal, folder / "w4a6.packed.pt")
    eight = saved_student(folder / "8.pt", embedding_bits=8, range_mode="fixed", per_channel=False)
    made = {}
    for name, network, (parent, source) in (("tables 4", model, restore(folder / "w4a6.packed.pt")), ("tables 8", eight[1], eight)):
        made[name] = network, folder / f"{name}.onnx"
        rows, _ = to_onnx.export(source, parent, made[name][1], IMAGE_HW, noise_frames(DATA, network.config.num_cameras, IMAGE_HW))
        assert all(row.passed for row in rows), parity.table(rows)
    return made


def test_the_onnx_of_a_packed_student_computes_what_the_student_computes(student, exports):
    _, model, _ = student
    frames = noise_frames(DATA, model.config.num_cameras, IMAGE_HW)
    rows = parity.measure(model, OnnxRunner(exports["tables 4"][1]), frames, parity.SUM_ORDER_CHANGE)
    assert all(row.passed for row in rows), parity.table(rows)


@pytest.mark.parametrize("bits", [4, 8])
def test_tables_become_integer_constants_of_the_graph(exports, bits):
    model, path = exports[f"tables {bits}"]
    proto, stored = onnx.load(path), onnx.load(path.with_suffix(".int4.onnx"))
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    four_bit = {tensor.name: tensor for tensor in stored.graph.initializer if tensor.data_type == TensorProto.INT4}
    dequantize = {node.input[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    tables = {name: layer for name, layer in quant_layers(model) if isinstance(layer, QuantEmbedding)}
    assert len(tables) == 4
    for name, layer in tables.items():
        integers = numpy_helper.to_array(constants[f"{name}.weight.int8"])
        scale = numpy_helper.to_array(constants[f"{name}.weight.scale"])
        assert integers.dtype == np.int8 and f"{name}.weight" not in constants
        assert (f"{name}.weight.int8" in four_bit) == (bits == 4)
        assert dequantize[f"{name}.weight.int8"].attribute[0].i == 0
        np.testing.assert_array_equal(integers * scale[:, None], layer.weight.detach().numpy())
        if bits == 4:
            assert len(four_bit[f"{name}.weight.int8"].raw_data) == integers.size / 2
    feeds = first_inputs(model)
    first, second = OnnxRunner(path)(feeds), OnnxRunner(path.with_suffix(".int4.onnx"))(feeds)
    assert all(np.array_equal(first[name], second[name]) for name in OUTPUTS)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("name", "per_channel"), [("tables 4", True), ("tables 8", False)])
def test_every_mode_passes_the_whole_export(exports, name, per_channel):
    proto = onnx.load(exports[name][1])
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    weights = [node for node in proto.graph.node if node.input and node.input[0].endswith("linear1.weight.int8")]
    assert {len(constants[node.input[1]].dims) for node in weights} == {1 if per_channel else 0}
    assert artifact.unseal(exports[name][1], "onnx").facts.int4_bytes is not None
