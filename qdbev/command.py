"""Parts that every entry point shares: options for settings and the device, progress lines, and errors as one line."""

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from typing import ParamSpec

import torch

P = ParamSpec("P")

ROOMS = ("__main__", "qdbev", "train", "export", "plugins", "engine", "eval", "bench", "synthetic")
"""Names of the loggers whose progress lines are shown."""


def entry_point(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap `main` so that progress lines are shown, and user errors (ValueError, OSError) become one line and exit status 1."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        _show_progress()
        try:
            main(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error

    return wrapper


class _Stderr(logging.Handler):
    """Writes to the sys.stderr of the moment, which a test may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _show_progress() -> None:
    """Show the project's own progress lines. Libraries keep their level, because pytorch-quantization reports every quantizer."""
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.setLevel(logging.INFO)
        logger.handlers = [_Stderr()]
        logger.propagate = False


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the --set option; `config.override` applies its values (args.settings)."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="settings", help="change one setting; may be repeated"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the --device option; `parse_device` checks its value."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")


def parse_device(name: str) -> torch.device:
    """Return the device called `name`. Raises ValueError if this machine has no such device."""
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device; use cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not supported; use cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} needs an NVIDIA GPU and a CUDA build of torch; none is usable here, use --device cpu")
    return found
