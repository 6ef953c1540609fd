"""The sizes report collects what exports and engines recorded in their seals, and refuses files that changed since."""

import dataclasses
import json

import pytest

from bench import sizes
from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.facts import BackendVersion, EngineFacts, OnnxFacts, Target
from qdbev.schema import Interface

INTERFACE = Interface(inputs={"images": (1, 6, 3, 32, 64)}, outputs={"bev": (1, 64, 16)})
ONNX = OnnxFacts(
    interface=INTERFACE,
    bytes=2_000_000,
    nodes=7,
    trace_s=1.5,
    peak_memory_mb=2048,
    parity={f"{name}_max_abs": 2e-5 for name in ("bev", "box_code", "cls_logits")},
)
ENGINE = EngineFacts(
    interface=INTERFACE,
    backend=BackendVersion(name="tensorrt-rtx", version="1.7.1"),
    target=Target(compute_capabilities=None),
    build_seconds=4.5,
    plan_bytes=3_000_000,
    audit={"quantized_layers": 9, "int8_layers": 8, "kernels": 30},
    layer_table_sha256="0" * 64,
)


def sealed(path, facts):
    """Write a file with a seal that contains these facts."""
    path.write_bytes(b"content of " + path.name.encode())
    artifact.seal(path, config={}, parent=None, facts=facts)


def as_json(facts):
    """Return the facts as they are read back from a JSON file."""
    return json.loads(json.dumps(dataclasses.asdict(facts)))


def test_onnx_files_and_engines_of_a_run_are_printed_and_written_as_one_report(tmp_path, capsys):
    sealed(tmp_path / "tiny.onnx", ONNX)
    sealed(tmp_path / "tiny.engine", ENGINE)
    (tmp_path / "w4a6.int4.onnx").write_bytes(b"a storage form, which the report leaves out")
    sizes.main(["--run", str(tmp_path)])
    kept = json.loads((tmp_path / sizes.FILE).read_text())
    assert kept["onnx"] == [{"name": "tiny", **as_json(ONNX)}]
    assert kept["engines"] == [{"name": "tiny", **as_json(ENGINE)}]
    printed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")}
    assert sorted(printed) == ["tiny", "tiny.engine:"]
    nodes, megabytes, seconds, peak_gigabytes, *parity = map(float, printed["tiny"].split()[1:])
    assert (nodes, megabytes, seconds, peak_gigabytes, parity) == (7, 2.0, 1.5, 2.0, [2e-5] * 3)
    assert {"8", "9", "30", "3.0", "4.5"} <= set(printed["tiny.engine:"].split())


def test_an_empty_folder_and_an_altered_file_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"\.onnx"):
        sizes.collect(tmp_path)
    sealed(tmp_path / "tiny.onnx", ONNX)
    (tmp_path / "tiny.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"tiny\.onnx"):
        sizes.collect(tmp_path)
