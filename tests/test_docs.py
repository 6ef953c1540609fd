"""The pages agree with the repository: targets of links, commands and imports exist."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")}
FOLDERS = sorted({*PACKAGES, "docs", "examples", "results", "tests"})
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
FOREIGN = {"pip", "pytest", "venv", "ruff", "build"}
"""Modules that pages and Makefile run and that are not ours."""
RESULTS_NOT_YET_MEASURED = {"results/kernel_bench.json"}
"""Files that results/README.md describes as not yet measured."""
SHOWN = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def links(text: str) -> list[str]:
    """Targets of links and pictures in a page that are files."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [target.partition("#")[0] for target in found if not target.startswith(("http://", "https://", "#"))]


def anchors(text: str) -> list[str]:
    """Targets of links to a heading of the same page."""
    return re.findall(r"\]\(#([^)\s]+)\)", without_code(text))


def headings(text: str) -> set[str]:
    """The headings of a page as GitHub turns them into anchors."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def paths(text: str) -> list[str]:
    """Files in backticks that begin with one of our folders, as `train/qat.py`."""
    return re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)`", text)


def modules(text: str) -> set[str]:
    """Modules that are run, as `python -m train.qat` or by torchrun or make."""
    found = re.findall(r"(?:python3?|\$\(PY(?:THON)?\)) -m ([\w.]+)", text) + re.findall(r"torchrun .*?-m -- ([\w.]+)", text)
    return {name.rstrip(".") for name in found} - FOREIGN


def is_file_of(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() and "__main__" in path.with_suffix(".py").read_text()


def snippets(text: str) -> Iterator[str]:
    yield from re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def imported(code: str) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a snippet imports from our packages."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            yield from ((node.module or "", alias.name) for alias in node.names)


@SHOWN
def test_every_link_leads_to_a_file(page: Path):
    text = page.read_text()
    assert not [target for target in links(text) if not (page.parent / target).exists()]
    assert not set(anchors(text)) - headings(text)


@SHOWN
def test_every_file_that_a_page_names_exists(page: Path):
    named = paths(page.read_text())
    assert not [name for name in named if name not in RESULTS_NOT_YET_MEASURED and not any(ROOT.glob(name))]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_exists(page: Path):
    assert not [name for name in sorted(modules(page.read_text())) if not is_file_of(name)]


@SHOWN
def test_every_python_snippet_imports_what_exists(page: Path):
    for code in snippets(page.read_text()):
        for module, name in imported(code):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


@SHOWN
def test_every_make_target_of_a_page_exists(page: Path):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert not set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)) - targets


def test_every_command_is_listed():
    page = modules((ROOT / "docs" / "commands.md").read_text())
    run_by_make = modules((ROOT / "Makefile").read_text())
    assert not run_by_make - page


def test_a_wrong_page_is_seen(tmp_path: Path):
    text = "[a](gone.md) [b](#lost) `train/gone.py` and `python -m train.gone`\n```python\nfrom train.qat import gone\n```\n# Here\n"
    assert links(text) == ["gone.md"]
    assert set(anchors(text)) - headings(text) == {"lost"}
    assert paths(text) == ["train/gone.py"]
    assert modules(text) == {"train.gone"}
    assert not is_file_of("train.gone")
    assert [list(imported(code)) for code in snippets(text)] == [[("train.qat", "gone")]]
