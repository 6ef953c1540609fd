"""The engine room runs any detector: its code names none, and no tensor of a deployed graph that is not a field of `schema.Frame`."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.schema import Frame

ENGINE = Path(__file__).resolve().parents[1] / "engine"
INTERFACE = BEVFormerConfig().interface((480, 800))
TENSORS = {*INTERFACE.inputs, *INTERFACE.outputs} - {field.name for field in dataclasses.fields(Frame)}
"""Names that the engine room must take from an `Interface`. A frame's own fields are the data room's names, for every detector."""
PARTS = ("bev", "bevformer", "petr", "bevdepth")
"""Words that may not be part of a name in the code, as in `bev_hw`. The "bev" of the package name qdbev is no word of its own."""


def violations(source: str) -> Iterator[str]:
    """Names and texts of the code, without docstrings and comments, that belong to one detector."""
    tree = ast.parse(source)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings, also below constants
    for node in ast.walk(tree):
        for name in _names(node):
            words = name.lower().replace(".", "_").split("_")
            if name in TENSORS or any(part in words for part in PARTS):
                yield f"line {node.lineno}: {name}"
        if isinstance(node, ast.Constant) and node not in texts and node.value in TENSORS:
            yield f"line {node.lineno}: {node.value!r}"


def _names(node: ast.AST) -> list[str]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
            return [name]
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names):
            return [f"{module}.{alias.name}" for alias in names]
    return []


@pytest.mark.parametrize("path", sorted(ENGINE.glob("*.py")), ids=lambda path: path.name)
def test_the_engine_room_names_no_detector(path: Path) -> None:
    assert not list(violations(path.read_text()))


@pytest.mark.parametrize(
    "planted",
    [
        "from qdbev.detectors.bevformer.config import BEVFormerConfig",
        "import qdbev.detectors.bevformer.temporal",
        "from qdbev.detectors import petr",
        "outputs['bev']",
        "wanted = ('cls_logits', 'box_code')",
        "def run(images, prev_bev): ...",
        "session.infer(images=images, has_prev=one)",
        "shape = config.model.bev_hw",
        "class BEV_Session: ...",
    ],
)
def test_a_planted_violation_is_found(planted: str) -> None:
    assert list(violations(planted))


@pytest.mark.parametrize(
    "allowed",
    [
        '"""Docstrings may use `prev_bev` as an example."""',
        "NAMES = ()\n'''The recurrent outputs, such as bev.'''",
        "Frame(images=images, lidar2img=lidar2img, can_bus=can_bus)",
        "height = interface.inputs['images'][-2]",
        "from qdbev import detectors\nstream = detectors.stream(config.model)",
    ],
)
def test_fields_of_a_frame_and_docstrings_are_allowed(allowed: str) -> None:
    assert not list(violations(allowed))
