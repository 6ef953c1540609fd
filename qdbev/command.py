"""What every entry point does alike: settings on the command line, and errors as one line."""

import argparse
import functools
import sys
from collections.abc import Callable

import torch


def entry_point(main: Callable[[], None]) -> Callable[[], None]:
    """`main`, with user errors (ValueError, OSError) printed as one message and exit status 2."""

    @functools.wraps(main)
    def wrapper() -> None:
        try:
            main()
        except (ValueError, OSError) as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)

    return wrapper


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
