"""Checks: commands that run one after the other, each a process of its own, so that one that crashes or hangs ends nothing but itself."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

Figures = dict[str, Any]
Status = Literal["passed", "failed", "skipped"]
_LOG_LINES, _LINE_LENGTH = 30, 300
"""What is kept of the output of a check that did not pass."""
_REFUSED = 1
"""Exit status of `command.entry_point` after an error of the user's or the machine's."""


class Skipped(Exception):  # noqa: N818 - not an error
    """A command ran and found nothing that it could check; the message says why."""


def read_json(path: Path) -> Figures:
    """The file's content."""
    return json.loads(path.read_text())


@dataclass(frozen=True, kw_only=True)
class Check:
    """A command and what it needs. One that lacks something is skipped, and says what."""

    name: str
    command: tuple[str, ...]
    """A module and its arguments."""
    limit_s: float
    packages: tuple[str, ...] = ()
    """Modules that it imports and a machine may lack."""
    files: tuple[Path, ...] = ()
    """What must be there before it begins."""
    after: tuple[str, ...] = ()
    """Checks that must have passed."""
    figures: Path | None = None
    """File that it leaves; a "passed" of false anywhere in it is a failure, whatever the exit status."""
    read: Callable[[Path], Figures] = read_json
    """Takes the figures from the file; may raise Skipped."""
    may_be_refused: bool = False
    """Whether this machine may refuse it in so many words, which is then a finding: a skip with that reason, and no failure."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a check ended. `reason` and `log`, the end of the output, are of one that did not pass."""

    status: Status
    command: str
    seconds: float = 0.0
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    log: tuple[str, ...] = ()


def run_all(checks: Sequence[Check], folder: Path, limit_s: float) -> Iterator[tuple[str, Result]]:
    """Name and result of each check in turn; what begins later than `limit_s` seconds from now is skipped, what still runs is ended.

    `folder` takes the output of each, as NAME.log.
    """
    done: dict[str, Result] = {}
    end = time.monotonic() + limit_s
    for check in checks:
        left = end - time.monotonic()
        reason = lacks(check, done) or (f"the {limit_s:g} s of all checks are used up" if left <= 0 else "")
        skipped = Result(status="skipped", command=shown(check), reason=reason)
        done[check.name] = skipped if reason else run(check, folder / f"{check.name}.log", min(left, check.limit_s))
        yield check.name, done[check.name]


def lacks(check: Check, done: Mapping[str, Result]) -> str:
    """What keeps the check from running, or nothing."""
    missing = [package for package in check.packages if not _importable(package)]
    if missing:
        return f"no {', '.join(missing)}"
    for name in check.after:
        if done[name].status != "passed":
            return f"needs {name}, which {'failed' if done[name].status == 'failed' else 'was skipped'}"
    absent = [str(path) for path in check.files if not path.exists()]
    return f"needs {', '.join(absent)}" if absent else ""


def run(check: Check, log: Path, limit_s: float) -> Result:
    """Run a check that lacks nothing and judge it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status = _execute(check.command, log, limit_s)
    seconds = round(time.monotonic() - started, 2)
    lines = _tail(log)
    outcome, reason, figures = _judge(check, status, limit_s, lines)
    return Result(
        status=outcome,
        command=shown(check),
        seconds=seconds,
        reason=reason,
        figures=figures,
        log=() if outcome == "passed" else lines,
    )


def shown(check: Check) -> str:
    """The command line that repeats it."""
    return shlex.join(("python", "-m", *check.command))


def _judge(check: Check, status: int | None, limit_s: float, lines: tuple[str, ...]) -> tuple[Status, str, Figures]:
    """Status, reason and figures, which are kept of a failure, too."""
    figures, unread = _read(check)
    last = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
    if status is None:
        return "failed", f"ended after {limit_s:.0f} s, its limit", figures
    if status < 0:
        return "failed", f"ended by {signal.Signals(-status).name}", figures
    if isinstance(unread, Skipped):
        return "skipped", str(unread), figures
    if status == _REFUSED and last and check.may_be_refused:
        return "skipped", last, figures
    if status > 0:
        return "failed", last or f"exit status {status}", figures
    if unread is not None:
        return "failed", f"{check.figures} cannot be read: {unread}", figures
    wrong = list(_not_passed(figures))
    return ("failed", f"not passed: {', '.join(wrong)}", figures) if wrong else ("passed", "", figures)


def _read(check: Check) -> tuple[Figures, Exception | None]:
    """The figures, or why there are none."""
    if check.figures is None:
        return {}, None
    try:
        return check.read(check.figures), None
    except (Skipped, OSError, ValueError, ElementTree.ParseError) as reason:
        return {}, reason


def _execute(command: Sequence[str], log: Path, limit_s: float) -> int | None:
    """Exit status, or None when it was ended at its limit; whatever it started ends with it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}  # a process that dies leaves its output
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also when this process is told to end
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tail(log: Path) -> tuple[str, ...]:
    """The last lines, without the folder this runs in."""
    text = log.read_text(errors="replace").replace(f"{Path.cwd()}{os.sep}", "")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return tuple(line[:_LINE_LENGTH] for line in lines[-_LOG_LINES:])


def _not_passed(content: Any, name: str = "") -> Iterator[str]:
    """Dotted names of what holds "passed": false."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if key == "passed" and value is False:
            yield name or "the whole"
        else:
            yield from _not_passed(value, f"{name}.{key}".lstrip("."))


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
