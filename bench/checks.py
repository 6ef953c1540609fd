"""Runs commands one after the other as checks, each in a process of its own, so that a check that crashes or hangs ends no other."""

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
"""Number of lines, and characters of a line, that are kept of the output of a check that did not pass."""
_REFUSED = 1
"""Exit status of `command.entry_point` after an error of the user or the machine, which it prints as one line."""
_KILL_S = 10.0
"""Seconds that a killed process may take to end; a hanging GPU driver can hold it longer."""


class Skipped(Exception):  # noqa: N818 - not an error
    """Raised when a command ran but found nothing to check; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A command and its requirements. A check that lacks one of them is skipped, and its result names what is missing."""

    name: str
    command: tuple[str, ...]
    """Name of the module to run, and its arguments."""
    limit_s: float
    """Seconds after which the command is ended; the check has then failed."""
    packages: tuple[str, ...] = ()
    """Packages that the command imports and that a machine may lack."""
    files: tuple[Path, ...] = ()
    """Files that must exist before the command starts."""
    after: tuple[str, ...] = ()
    """Names of checks that must have passed before."""
    figures: Path | None = None
    """File that the command writes. An entry "passed" that is false anywhere in it makes the check fail, whatever the exit status."""
    read: Callable[[Path], Figures] = lambda path: json.loads(path.read_text())
    """Reads the figures from that file; may raise Skipped."""
    may_be_refused: bool = False
    """If true, an exit with status 1 and an error message counts as skipped with that message, not as failed."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a check. `reason` and `log`, the end of the output, are empty for a check that passed."""

    status: Status
    command: str
    seconds: float = 0.0
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    log: tuple[str, ...] = ()


def run_all(checks: Sequence[Check], folder: Path, limit_s: float) -> Iterator[tuple[str, Result]]:
    """Run the checks in order; yields the name and the result of each.

    Args:
        folder: Gets the output of each check as NAME.log.
        limit_s: Seconds for all checks together. The check that runs when they are over is ended, later ones are skipped.
    """
    done: dict[str, Result] = {}
    end = time.monotonic() + limit_s
    for check in checks:
        left = end - time.monotonic()
        reason = lacks(check, done) or (f"the time limit of {limit_s:g} s for all checks was reached" if left <= 0 else "")
        skipped = Result(status="skipped", command=shown(check), reason=reason)
        done[check.name] = skipped if reason else run(check, folder / f"{check.name}.log", min(left, check.limit_s))
        yield check.name, done[check.name]


def lacks(check: Check, done: Mapping[str, Result]) -> str:
    """The reason why a check cannot run, such as a missing package; empty if it can run."""
    missing = [package for package in check.packages if not _importable(package)]
    if missing:
        return f"missing packages: {', '.join(missing)}"
    for name in check.after:
        if done[name].status != "passed":
            return f"needs {name}, which {'failed' if done[name].status == 'failed' else 'was skipped'}"
    absent = [str(path) for path in check.files if not path.exists()]
    return f"needs {', '.join(absent)}" if absent else ""


def run(check: Check, log: Path, limit_s: float) -> Result:
    """Run a check whose requirements are met, and return its result."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status = _execute(check.command, log, limit_s)
    seconds = round(time.monotonic() - started, 2)
    lines = _tail(log)
    outcome, reason, figures = _judge(check, status, limit_s, lines)
    kept = () if outcome == "passed" else lines
    return Result(status=outcome, command=shown(check), seconds=seconds, reason=reason, figures=figures, log=kept)


def shown(check: Check) -> str:
    """The command line that runs the check again."""
    return shlex.join(("python", "-m", *check.command))


def _judge(check: Check, status: int | None, limit_s: float, lines: tuple[str, ...]) -> tuple[Status, str, Figures]:
    """Status, reason and figures of a command that has ended; the figures of a failed check are kept too."""
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
    """The figures of a check, or the exception that says why there are none."""
    if check.figures is None:
        return {}, None
    try:
        return check.read(check.figures), None
    except (Skipped, OSError, ValueError, ElementTree.ParseError) as reason:
        return {}, reason


def _execute(command: Sequence[str], log: Path, limit_s: float) -> int | None:
    """Run a command; returns its exit status, or None if it was ended at its limit. Processes that it started are ended with it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}  # so that the output of a process that crashes is kept
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
        finally:  # also when this process itself is ended
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)


def _tail(log: Path) -> tuple[str, ...]:
    """The last lines of a log, without the path of the working folder."""
    text = log.read_text(errors="replace").replace(f"{Path.cwd()}{os.sep}", "")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return tuple(line[:_LINE_LENGTH] for line in lines[-_LOG_LINES:])


def _not_passed(content: Any, name: str = "") -> Iterator[str]:
    """Dotted names of all entries that hold "passed": false."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if key == "passed" and value is False:
            yield name or "the whole file"
        else:
            yield from _not_passed(value, f"{name}.{key}".lstrip("."))


def _importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a package around it is missing
        return False
