"""Modules that a test writes into its folder and runs as checks."""

import json
import os
import time
from pathlib import Path

import pytest

from bench.checks import Check, Result, run_all


def code(name: str, text: str) -> str:
    """Write a module into the working folder."""
    Path(f"{name}.py").write_text(text)
    return name


def script(name: str, text: str, **settings) -> Check:
    """A check that runs `text`."""
    return Check(**{"name": name, "command": (code(name, text),), "limit_s": 20.0, **settings})


def leaves(name: str, content: object) -> Check:
    """A check that writes `content` as its figures."""
    return script(name, f"open('{name}.json', 'w').write({json.dumps(content)!r})", figures=Path(f"{name}.json"))


def results(*wanted: Check, limit_s: float = 60.0) -> dict[str, Result]:
    """Run checks in a folder `work` and return their results by name."""
    return dict(run_all(wanted, Path("work"), limit_s))


def assert_gone(pid: int) -> None:
    """Fail unless the process ends within seconds."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return  # dead, and waits for a parent that does not look
        time.sleep(0.1)
    pytest.fail(f"process {pid} lives on")
