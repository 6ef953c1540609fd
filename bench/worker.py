"""Runs a measurement in a process of its own, so that its peak memory is its own and a failure ends nothing else.

The parent watches the memory of the process from outside. A limit of its address space would not do, because OpenBLAS waits without an end
when it cannot allocate memory.
"""

import multiprocessing
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

_POLL_S = 0.02
"""Seconds between two checks of the memory of a running process."""
_KILL_S = 10.0
"""Seconds that a killed process may take to end; the kernel can hold it longer only in an uninterruptible call."""


class WorkerError(ValueError):
    """A worker ran out of its memory or time limit, ended, or its work raised an error. The worker cannot be used any more."""


class Worker:
    """A process that prepares some work once and runs it whenever it is asked. A context manager; the process is ended on leaving it.

    `prepare`, a function of a module, is called in the process with `arguments` and returns the work. Arguments and results are pickled.
    """

    def __init__(self, prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join(_KILL_S)

    def run(self, limit_bytes: int, limit_s: float) -> Any:
        """Run the work once and return its result. The first run includes the time to start the process and to prepare the work.

        Args:
            limit_bytes: Resident memory in bytes that the process may take.
            limit_s: Seconds that the run may take.

        Raises:
            WorkerError: The process exceeded a limit and was ended, it ended by itself, or the work raised an error.
        """
        deadline = time.monotonic() + limit_s
        reason = "the process ended by itself; if it printed no error, memory most likely ran out"
        try:
            self._pipe.send("run")
            while not self._pipe.poll(_POLL_S):
                if status_kib("VmRSS", self._process.pid) * 1024 > limit_bytes:
                    reason = f"took more than {limit_bytes / 2**30:.2f} GiB of memory"
                    self._process.kill()
                elif time.monotonic() > deadline:
                    reason = f"took more than {limit_s:.0f} s"
                    self._process.kill()
            result, error = self._pipe.recv()
        except (EOFError, OSError) as ended:
            raise WorkerError(reason) from ended
        if error:
            raise WorkerError(error)
        return result


def status_kib(name: str, pid: int | str | None = "self") -> int:
    """A figure in KiB that Linux reports about a process in /proc, such as VmRSS; 0 for a process that has ended."""
    found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def _serve(pipe: Connection, prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    """Prepare the work, then send its result, or the text of its error, for every message, until the other end closes."""
    work = None
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            work = work or prepare(*arguments)
            pipe.send((work(), ""))
        except (RuntimeError, MemoryError, ValueError) as error:
            pipe.send((None, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"))
            return
