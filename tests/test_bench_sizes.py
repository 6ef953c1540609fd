"""What exports and engines measured is collected from their seals, and only from files that are as they were sealed."""

import json

import pytest

from bench import sizes
from qdbev import artifact
from qdbev.artifact import ArtifactError

ONNX = {"nodes": 7, "bytes": 2_000_000, "trace_s": 1.5, "peak_memory_mb": 2048} | {
    f"parity_{name}_max_abs": 2e-5 for name in ("bev", "box_code", "cls_logits")
}
AUDIT = {"quantized_layers": 9, "int8_layers": 8, "kernels": 30}


def sealed(path, kind, facts):
    path.write_bytes(b"content of " + path.name.encode())
    artifact.seal(path, kind=kind, config={}, parent=None, facts=facts)


def test_files_and_engines_of_a_run_make_one_table(tmp_path, capsys):
    sealed(tmp_path / "tiny.onnx", "onnx", ONNX)
    sealed(tmp_path / "tiny.engine", "engine", {"audit": AUDIT, "plan_bytes": 3_000_000, "build_seconds": 4.5})
    (tmp_path / "w4a6.int4.onnx").write_bytes(b"a storage form, not measured by itself")
    sizes.main(["--run", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "tiny               7    2.0      1.5      2.0     2.0e-05" in printed
    assert "tiny.engine: 8 of 9 quantized layers in INT8, 30 kernels, 3.0 MB, built in 4.5 s" in printed
    kept = json.loads((tmp_path / sizes.FILE).read_text())
    assert [row["name"] for row in kept["onnx"]] == [row["name"] for row in kept["engines"]] == ["tiny"]


def test_an_empty_folder_and_an_altered_file_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no .onnx"):
        sizes.collect(tmp_path)
    sealed(tmp_path / "tiny.onnx", "onnx", ONNX)
    (tmp_path / "tiny.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="tiny.onnx"):
        sizes.collect(tmp_path)
