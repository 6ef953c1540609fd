"""Only an editable clone can be installed, so that packages with generic names such as `train` are never put into site-packages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the project without artifacts, because a build writes into the folder it builds."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def pip(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_copy_in_site_packages_is_refused_with_the_command_that_works(clone: Path, tmp_path: Path):
    done = pip("install", *OFFLINE, "--target", tmp_path / "site", clone)
    assert done.returncode != 0
    assert "run `pip install -e .` in the clone" in done.stdout + done.stderr
    assert not list(tmp_path.glob("site/*"))


def test_an_editable_clone_makes_every_package_importable_from_anywhere(clone: Path, tmp_path: Path):
    done = pip("install", *OFFLINE, "--prefix", tmp_path / "env", "--editable", clone)
    assert done.returncode == 0, done.stderr
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    assert not [name for name in PACKAGES if (site / name).exists()]
    assert {"qdbev", "train", "export", "engine", "eval"} <= set(PACKAGES)
    code = (
        f"import importlib, site; site.addsitedir({str(site)!r})\nfor name in {PACKAGES!r}: print(importlib.import_module(name).__file__)"
    )
    found = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=240)
    assert found.stdout.split() == [str(clone / name / "__init__.py") for name in PACKAGES]
