"""Compiles the CPU kernels for PyTorch and for OpenVINO, and prints the paths of the libraries: `python -m plugins.cpu.install`."""

import argparse
import sys

from plugins.cpu.build import compiled_if_possible
from qdbev.command import entry_point


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compile both libraries and print their paths."""
    argparse.ArgumentParser(prog="python -m plugins.cpu.install", description=main.__doc__).parse_args(argv)
    for path in (compiled_if_possible("torch"), compiled_if_possible("openvino")):
        if path:
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
