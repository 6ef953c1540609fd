"""Callbacks for TensorRT: a logger, which keeps errors and the layer table, and a progress bar of a build.

TensorRT only calls classes that are derived from its own, so they are defined inside functions that get the Python binding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tqdm import tqdm

from engine.layer_table import TABLE_START


def one_line(text: str) -> str:
    """A message of TensorRT as one line of at most 300 characters."""
    return " ".join(text.split())[:300]


def logger(trt: ModuleType) -> Any:
    """Make a logger that keeps errors (`problems`) and TensorRT-RTX's layer table (`layer_table`), and drops all other messages."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []
            self.layer_table = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.problems.append(one_line(message))
            elif message.startswith(TABLE_START):
                self.layer_table = message

    return Logger()


@contextmanager
def progress(trt: ModuleType, title: str) -> Iterator[Any]:
    """Show a progress bar of the outermost phase of a build, if standard error is a terminal. Yields an IProgressMonitor for the builder.

    Raises KeyboardInterrupt when the block ends, if Ctrl-C ended the build: TensorRT itself only returns without an engine.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost = ""
            self.interrupted = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost = name
                bar.reset(steps)
            bar.set_postfix_str(name)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                if name == self.outermost:
                    bar.update(step + 1 - bar.n)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, name: str) -> None:
            if name == self.outermost:
                bar.update((bar.total or 0) - bar.n)

    with tqdm(desc=title, unit="step", disable=None, leave=False) as bar:
        monitor = Monitor()
        yield monitor
        if monitor.interrupted:
            raise KeyboardInterrupt
