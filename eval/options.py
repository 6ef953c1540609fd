"""Command-line options that all evaluation commands share."""

import argparse
import dataclasses

from qdbev.config import Config


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the dataset and split, which `chosen_data` reads, and the device of a checkpoint."""
    parser.add_argument("--data", help="dataset folder (default: the one in the model's config)")
    parser.add_argument("--version", help="version of the dataset, as v1.0-mini (default: the one in the model's config)")
    parser.add_argument("--split", help="val, mini_val, ... or one of splits.json (default: the model's data.val_split)")
    parser.add_argument("--device", help="where a .pt runs: cpu, cuda (default: cpu)")


def chosen_data(config: Config, args: argparse.Namespace) -> tuple[Config, str]:
    """The model's config with the dataset of the command line, and the split."""
    data = dataclasses.replace(config.data, root=args.data or config.data.root, version=args.version or config.data.version)
    return dataclasses.replace(config, data=data), args.split or config.data.val_split
