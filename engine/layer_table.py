"""The layer table of a built engine: which kernels it runs and in which number formats.

TensorRT provides the table as JSON through EngineInspector. TensorRT-RTX cannot inspect an engine without a GPU, but prints the same table
while it builds, as one verbose log message that starts with "Layers:" (seen in 1.7.1). Both need ProfilingVerbosity.DETAILED.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backend import EngineError
from qdbev import artifact

TABLE_START = "Layers:"
"""First word of the log message that holds TensorRT-RTX's layer table."""
_ROW = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\](?:, )?(?:Constants: \[(?P<constants>.*?)\](?:, )?)?"
    r"Outputs: \[(?P<outputs>.*)\], TacticName: (?P<tactic>.*?), StreamId: .*Metadata: (?P<nodes>.*)$"
)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\s*\[ONNX Layer: |\s*$)")
_TYPE = re.compile(r"\b(Float|Half|BFloat16|Int8|Int32|Int64|Int4|Bool|FP8|FP4|FP32|FP16|BF16|UInt8)\b", re.IGNORECASE)
_TYPE_NAMES = {"FLOAT": "FP32", "HALF": "FP16", "BFLOAT16": "BF16"}
_TENSORS = ("inputs", "constants", "outputs")
"""Fields of a row that list tensors."""
_NO_KERNEL = ("signal", "wait", "noop", "constant")
"""Kinds of rows that launch no kernel on the GPU: stream synchronisation and folded constants."""


@dataclass(frozen=True)
class Layer:
    """One row of the table: a layer of the engine.

    `inputs`, `constants` and `outputs` are the types of its tensors, such as INT8, FP16 or FP32; `nodes` are the ONNX nodes fused into it.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]

    @property
    def is_kernel(self) -> bool:
        """True if the layer launches a kernel on the GPU."""
        return self.kind.lower() not in _NO_KERNEL


def from_log(message: str) -> list[Layer]:
    """Read the rows of the log message that starts with "Layers:". Raises EngineError if one has an unknown form, or if there are none."""
    layers = [_from_line(line) for line in message.splitlines() if line.startswith("Name: ")]
    if not layers:
        raise EngineError(f"the builder's layer table has no rows; it begins {message[:120]!r}")
    return layers


def from_inspector(text: str) -> list[Layer]:
    """Read the rows of EngineInspector's JSON. Raises EngineError if the engine was built without ProfilingVerbosity.DETAILED."""
    rows = json.loads(text)["Layers"]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise EngineError("the engine holds layer names only; build it with this project, which asks for ProfilingVerbosity.DETAILED")
    return [_from_inspected(row) for row in rows]


def save(path: Path, layers: list[Layer]) -> None:
    """Write the rows as JSON."""
    with artifact.atomic(path) as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(layer) for layer in layers], indent=1))


def load(path: Path, sha256: str) -> list[Layer]:
    """Read the rows that `save` wrote. Raises EngineError if the file is missing or its hash is not `sha256` of the engine's seal."""
    if not path.is_file():
        raise EngineError(f"{path} does not exist; it is written when the engine is built: copy it beside the engine, or build again")
    actual = artifact.sha256(path)
    if actual != sha256:
        raise EngineError(f"{path} is not of this engine: sha256 {actual[:12]}, the engine's seal says {sha256[:12]}; build it again")
    rows = json.loads(path.read_text())
    return [Layer(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}) for row in rows]


def table_path(engine: Path) -> Path:
    """Path of the layer table of `engine`."""
    return engine.with_name(engine.name + ".layers.json")


def _from_line(line: str) -> Layer:
    row = _ROW.match(line)
    if row is None:
        raise EngineError(f"a line of the builder's layer table cannot be read: {line[:200]!r}")
    types = {part: _types(re.findall(r"Datatype: (\w+)", row[part] or "")) for part in _TENSORS}
    return Layer(name=row["name"], kind=row["kind"], **types, tactic=row["tactic"], nodes=_nodes(row["nodes"]))


def _from_inspected(row: dict[str, Any]) -> Layer:
    types = {part: _types(map(_type_field, row.get(part.capitalize(), []))) for part in _TENSORS}
    weights = row.get("Weights")
    if isinstance(weights, dict) and "Type" in weights:
        types["constants"] = (*_types([weights["Type"]]), *types["constants"])
    nodes = _nodes(row.get("Metadata", "").replace("\x1e", "").replace("\x1f", ""))
    return Layer(name=row["Name"], kind=row.get("LayerType", "unknown"), **types, tactic=row.get("TacticName", ""), nodes=nodes)


def _type_field(tensor: dict[str, Any]) -> str:
    """The type of a tensor; TensorRT 10 joins it with the format in one field, TensorRT 11 has a field for it."""
    return next((str(tensor[key]) for key in ("Datatype", "DataType", "Format/Datatype") if key in tensor), "unknown")


def _types(texts: Iterable[str]) -> tuple[str, ...]:
    found = [_TYPE.search(text) for text in texts]
    names = [match[1].upper() if match else "unknown" for match in found]
    return tuple(_TYPE_NAMES.get(name, name) for name in names)


def _nodes(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_NODE.findall(metadata)))
