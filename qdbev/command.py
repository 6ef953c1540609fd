"""What every entry point does alike: settings on the command line, and errors as one line."""

import argparse
import functools
import logging
import sys
from collections.abc import Callable
from typing import ParamSpec

import torch

P = ParamSpec("P")

ROOMS = ("__main__", "qdbev", "train", "export", "plugins", "engine", "eval", "bench", "synthetic")
"""Loggers whose progress is shown."""


def entry_point(main: Callable[P, None]) -> Callable[P, None]:
    """`main` with progress lines on, and with user errors (ValueError, OSError) as one line and exit status 1."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        _show_progress()
        try:
            main(*args, **kwargs)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error

    return wrapper


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _show_progress() -> None:
    """Let the project's own loggers speak; libraries are left alone, and only warn (pytorch-quantization reports every quantizer)."""
    for room in ROOMS:
        logger = logging.getLogger(room)
        logger.setLevel(logging.INFO)
        logger.handlers = [_Stderr()]
        logger.propagate = False


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The --set option; its values go to config.override."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="settings", help="change one setting; may be repeated"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """The --device option; read it with `device`."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")


def device(name: str) -> torch.device:
    """The named device.

    Raises:
        ValueError: There is no such device here.
    """
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device; use cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} needs an NVIDIA GPU and a CUDA build of torch; none is usable here, use --device cpu")
    return found
