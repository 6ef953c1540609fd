"""The import table: who may import whom, and which room owns which package. The rule is in CONTRIBUTING.md; change both together."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("qdbev", "train", "export", "plugins", "engine", "eval", "bench", "synthetic")

GROUND = ("qdbev.settings", "qdbev.schema", "qdbev.can_bus", "qdbev.geometry", "qdbev.cuda_check", "qdbev.command")
"""Modules that import no other module of the project, except that `detector`, `facts` and the like build on them."""
DETECTOR_PARTS = ("qdbev.detector", "qdbev.ops", "qdbev.nn")
SAVED = ("qdbev.facts", "qdbev.config_migrations", "qdbev.config", "qdbev.seal_migrations", "qdbev.artifact")
"""Configs and seals, which a session in a vehicle reads without torch."""
CORE = (
    *GROUND,
    *DETECTOR_PARTS,
    *SAVED,
    "qdbev.deployed_graph",
    "qdbev.data",
    "qdbev.frames",
    "qdbev.quant",
    "qdbev.detectors",
    "qdbev.recipes",
    "qdbev.restore",
)
ROOMS = ("train", "export", "plugins", "engine", "eval")
MAY_IMPORT = {
    **dict.fromkeys(GROUND, ()),
    "qdbev.detector": ("qdbev.schema",),
    "qdbev.deployed_graph": ("qdbev.schema",),
    "qdbev.ops": (),
    "qdbev.nn": (*GROUND, "qdbev.detector", "qdbev.ops"),
    "qdbev.quant": ("qdbev.settings", "qdbev.detector"),
    "qdbev.detectors": ("qdbev.detector", "qdbev.nn.state_dict"),
    "qdbev.detectors.bevformer": (*GROUND, *DETECTOR_PARTS),
    "qdbev.detectors.bevformer.recipes": (
        "qdbev.detectors.bevformer.config",
        "qdbev.config",
        "qdbev.data.config",
        "qdbev.nn.config",
        "qdbev.quant.config",
        "qdbev.settings",
    ),
    "qdbev.facts": ("qdbev.schema",),
    "qdbev.config_migrations": ("qdbev.settings",),
    "qdbev.config": (
        "qdbev.settings",
        "qdbev.schema",
        "qdbev.config_migrations",
        "qdbev.data.config",
        "qdbev.quant.config",
        "qdbev.detectors",
    ),
    "qdbev.seal_migrations": ("qdbev.settings", "qdbev.config"),
    "qdbev.artifact": ("qdbev.settings", "qdbev.facts", "qdbev.config_migrations", "qdbev.seal_migrations"),
    "qdbev.data": (*GROUND, "qdbev.facts", "qdbev.artifact"),
    "qdbev.frames": ("qdbev.config", "qdbev.data"),
    "qdbev.recipes": ("qdbev.settings", "qdbev.config", "qdbev.quant.config", "qdbev.detectors.bevformer.recipes"),
    "qdbev.restore": (*GROUND, *SAVED, "qdbev.detector", "qdbev.detectors", "qdbev.quant"),
    "train": (*CORE, "plugins.torch_ops"),
    "export": CORE,
    "plugins": CORE,
    "engine": (*CORE, "plugins", "export.parity", "export.runner"),
    "eval": (*CORE, "export.runner", "engine.open_session", "plugins.torch_ops"),
    "synthetic": (*GROUND, "qdbev.data"),
    "bench": (*CORE, *ROOMS, "synthetic"),
}
"""The most specific entry of a module counts. Every room may also import itself."""
ONE_DETECTOR = tuple(f"qdbev.detectors.{path.name}" for path in (ROOT / "qdbev" / "detectors").iterdir() if path.is_dir())
"""Folders of single detectors. Only their own files, qdbev/detectors/__init__.py, qdbev/recipes.py and `bench` import them."""

INSIDE_FUNCTIONS = ("export.runner", "export.parity", "engine.open_session", "plugins.torch_ops")
"""Modules of other rooms that train, engine and eval import inside functions only, when such a file is opened or computed."""

OWNERS = {
    "cv2": ("qdbev.data", "eval", "synthetic", "bench"),
    "pyquaternion": ("synthetic",),
    "nuscenes": ("qdbev.data", "eval", "synthetic"),
    "nuscenes.eval.detection.evaluate": ("eval",),
    "matplotlib": ("eval", "bench"),
    "pytorch_quantization": ("qdbev.quant",),
    "scipy": ("train", "eval", "synthetic"),
    "torch.distributed": ("train",),
    "onnx": ("export", "engine", "qdbev.deployed_graph"),
    "onnx_ir": ("export",),
    "onnxscript": ("export",),
    "onnxruntime": ("export",),
    "tensorrt": ("engine", "plugins", "bench"),
    "tensorrt_rtx": ("engine",),
    "openvino": ("engine",),
    "cuda.bindings.nvrtc": ("plugins",),
    "cuda": ("engine", "plugins", "bench"),
}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Every imported name, dotted, and whether the import is inside a function."""
    tree = ast.parse(source)
    inside = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node in inside) for alias in node.names)


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def room_of(name: str) -> str:
    return next((room for room in sorted(MAY_IMPORT, key=len, reverse=True) if within(name, (room,))), name)


def violations(module: str, source: str) -> list[str]:
    """Imports of `module` that the table does not allow."""
    room = room_of(module)
    found = []
    knows_detectors = within(module, (*ONE_DETECTOR, "qdbev.recipes", "bench")) or module == "qdbev.detectors"
    for name, in_function in imports(source):
        if within(name, ONE_DETECTOR) and not knows_detectors:
            found.append(f"{module} imports {name}, but no room knows a concrete detector")
        ours = name.split(".")[0] in SOURCES
        if ours and not within(name, (room, *MAY_IMPORT.get(room, ()))) and not _whole_package(name, room):
            found.append(f"{module} imports {name}")
        if ours and not within(name, (room,)) and room != "bench" and within(name, INSIDE_FUNCTIONS) and not in_function:
            found.append(f"{module} imports {name} outside a function")
        owner = max((package for package in OWNERS if within(name, (package,))), key=len, default=None)
        if owner and not within(module, OWNERS[owner]):
            found.append(f"{module} imports {name}, which belongs to {', '.join(OWNERS[owner])}")
    return found


def _whole_package(name: str, room: str) -> bool:
    """`from qdbev import geometry` reads as qdbev.geometry, which `within` judges; anything else of the bare package is refused."""
    return name == "qdbev" or (name.rpartition(".")[0] == "qdbev" and within(name, MAY_IMPORT.get(room, ())))


def modules() -> list[tuple[str, Path]]:
    files = [path for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in files]


def test_every_import_follows_the_table():
    found = [line for module, path in modules() for line in violations(module, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qdbev.nn.set_head", "from qdbev.quant.prepare import prepare"),
        ("qdbev.config", "import qdbev.recipes"),
        ("export.parity", "from train.loop import fit"),
        ("engine.session", "from qdbev.detectors.bevformer.config import BEVFormerConfig"),
        ("qdbev.quant.prepare", "from qdbev.config import Config"),
        ("qdbev.detectors.bevformer.model", "from qdbev.config import Config"),
        ("qdbev.nn.transformer", "from qdbev import detectors"),
        ("eval.open_model", "from export.runner import OnnxRunner"),
        ("eval.run", "def f():\n    from export.trace import trace"),
        ("train.loop", "import onnxruntime"),
        ("export.runner", "from scipy import optimize"),
        ("qdbev.data.dataset", "from nuscenes.eval.detection.evaluate import DetectionEval"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert violations(module, source)


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, the first of them again at the end; empty if there is none.

    Imports inside functions count, as they only hide a circle. Imports for type annotations (`if TYPE_CHECKING:`) do not count.

    Args:
        sources: Source text of each module, by its dotted name.
    """
    graph = {module: {_module_of(name, sources) for name in _imports_at_run_time(source)} - {""} for module, source in sources.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]  # graphlib lists them from the imported to the importing module
    return []


def _imports_at_run_time(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = [ast.Pass()]
    yield from (name for name, _ in imports(ast.unparse(tree)))


def _module_of(name: str, sources: dict[str, str]) -> str:
    """The module among `sources` that an imported name is or is defined in; empty if there is none."""
    return next((module for module in (name, name.rpartition(".")[0]) if module in sources), "")


def test_no_modules_import_each_other_in_a_circle():
    found = circle({module: path.read_text() for module, path in modules()})
    assert not found, " imports ".join(found)


@pytest.mark.parametrize(
    "sources",
    [
        {"train.a": "from train import b", "train.b": "from train.a import f"},
        {"eval.a": "import eval.b", "eval.b": "def f():\n    from eval import a"},
        {"bench.a": "from bench.b import f", "bench.b": "import bench.c", "bench.c": "class A:\n    import bench.a"},
        {"engine.a": "async def f():\n    from engine.b import g", "engine.b": "from engine.a import f"},
        {"qdbev.nn": "from qdbev.nn.a import f", "qdbev.nn.a": "from qdbev.nn import g"},
    ],
)
def test_a_planted_circle_is_found(sources):
    found = circle({**sources, "qdbev.config": "import numpy", "train.c": "import qdbev.config"})
    assert set(found) == set(sources)
    assert found[0] == found[-1]


def test_imports_for_annotations_and_downhill_imports_are_no_circle():
    annotations = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from train.b import B\nelse:\n    import train.c"
    assert not circle({"train.a": annotations, "train.b": "from train.a import f", "train.c": "import numpy"})
    assert circle({"train.a": annotations, "train.b": "", "train.c": "import train.a"})


def test_every_module_belongs_to_a_room_of_the_table():
    strays = [module for module, _ in modules() if room_of(module) not in MAY_IMPORT and module != "qdbev"]
    assert not strays


def test_no_python_file_exceeds_400_lines():
    files = [*(path for _, path in modules()), *(ROOT / "tests").glob("*.py")]
    assert not [f"{path.name}: {lines}" for path in files if (lines := len(path.read_text().splitlines())) > 400]
