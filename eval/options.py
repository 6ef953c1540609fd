"""Command-line options that all evaluation commands share."""

import argparse
import dataclasses
from pathlib import Path

from qdbev.config import Config


def model_parser(prog: str, description: str, model: str, out: str, out_required: bool = False) -> argparse.ArgumentParser:
    """A parser with --model and --out, whose help texts are given, the options that `chosen_data` reads, and the device of a checkpoint."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("--model", type=Path, required=True, help=model)
    parser.add_argument("--out", type=Path, required=out_required, help=out)
    parser.add_argument("--data", help="dataset folder (default: the one in the model's config)")
    parser.add_argument("--version", help="version of the dataset, as v1.0-mini (default: the one in the model's config)")
    parser.add_argument("--split", help="val, mini_val, ... or one of splits.json (default: the model's data.val_split)")
    parser.add_argument("--device", help="where a .pt runs: cpu, cuda (default: cpu)")
    return parser


def chosen_data(config: Config, args: argparse.Namespace) -> tuple[Config, str]:
    """The model's config with the dataset of the command line, and the split."""
    data = dataclasses.replace(config.data, root=args.data or config.data.root, version=args.version or config.data.version)
    return dataclasses.replace(config, data=data), args.split or config.data.val_split
