"""Turns published checkpoints into teachers, and says which recipe a checkpoint fits.

python -m train.official inspect bevformer_tiny_epoch_24.pth
python -m train.official convert --checkpoint bevformer_tiny_epoch_24.pth --teacher runs/tiny/teacher.pt
"""

import argparse
import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qdbev import artifact, detectors
from qdbev.command import add_settings, entry_point
from qdbev.config import override, to_dict
from qdbev.data.image_transform import image_transform
from qdbev.facts import TeacherFacts
from qdbev.nn.state_dict import OfficialKeys, backbone_prefix, load_official, read_state_dict
from qdbev.recipes import RECIPES


def convert(checkpoint: Path, teacher: Path, settings: list[str]) -> str:
    """Write the teacher of a published checkpoint, with `settings` as of --set, and return the name of the recipe that it fits.

    Raises:
        StateDictError: The file is no checkpoint.
        ValueError: Its tensors fit no recipe.
    """
    state_dict = read_state_dict(checkpoint)
    name = fitting_recipe(state_dict)
    config = override(RECIPES[name](), settings)
    model = detectors.build(config.model)
    load_official(model, state_dict, detectors.official_keys(config.model))
    image_hw = image_transform(config.data, config.data.stored_hw).padded_hw
    facts = TeacherFacts(image_hw=image_hw, official=artifact.sha256(checkpoint))
    artifact.save_checkpoint(teacher, config=to_dict(config), weights=model.state_dict(), parent=None, facts=facts)
    return name


def inspect(checkpoint: Path) -> str:
    """Describe a checkpoint in one line: the recipe that it fits, or the recipes that can start from its backbone.

    Raises:
        StateDictError: The file is no checkpoint.
        ValueError: Its tensors fit no recipe and no recipe can start from them.
    """
    state_dict = read_state_dict(checkpoint)
    if backbone := initialisation(state_dict):
        return backbone
    parameters = sum(value.numel() for key, value in state_dict.items() if "running_" not in key and "num_batches" not in key)
    return f"{fitting_recipe(state_dict)}, {len(state_dict)} tensors, {parameters / 1e6:.2f} M parameters"


def fitting_recipe(state_dict: Mapping[str, Tensor]) -> str:
    """Return the name of the recipe whose model has exactly the tensors of an official state dict.

    Raises:
        ValueError: No recipe's model has them. The message names the recipes that can start from the file's backbone, or else the nearest
            recipe and its differences.
    """
    official = {name: _keys_and_shapes(name) for name in RECIPES}
    differences = {name: keys.differences(state_dict, shapes) for name, (keys, shapes) in official.items()}
    nearest = min(differences, key=lambda name: len(differences[name]))
    if not differences[nearest]:
        return nearest
    if backbone := initialisation(state_dict):
        raise ValueError(f"the file is no detector of this project but {backbone}")
    raise ValueError(f"these {len(state_dict)} tensors fit none of {', '.join(RECIPES)}; nearest is {nearest}, with {differences[nearest]}")


def initialisation(state_dict: Mapping[str, Tensor]) -> str | None:
    """Describe the backbone from which a training can start, for a file that has a ResNet and no head of this project's detectors.

    Returns:
        The kind of ResNet, and the recipes that can start from it; None for all other files.
    """
    heads = tuple(sorted({detectors.official_keys(recipe().model).head for recipe in RECIPES.values()}))
    prefix = backbone_prefix(state_dict)
    if prefix is None or any(key.startswith(heads) for key in state_dict):
        return None
    blocks = {match.groups() for key in state_dict if (match := re.match(re.escape(prefix) + r"layer(\d+)\.(\d+)\.", key))}
    stages = [stage for stage, _ in blocks]
    depths = tuple(stages.count(stage) for stage in sorted(set(stages)))
    deformable = " with deformable convolutions" if any("conv_offset." in key for key in state_dict) else ""
    recipes = [name for name, recipe in RECIPES.items() if recipe().model.backbone.depths == depths]
    use = f"use python -m train.teacher --recipe {' or '.join(recipes)} --pretrained" if recipes else "no recipe has such a backbone"
    without = " or ".join(head.rstrip(".") for head in heads)
    return f"a ResNet-{3 * sum(depths) + 2} initialisation{deformable}, without {without}: {use}"


@functools.cache
def _keys_and_shapes(recipe: str) -> tuple[OfficialKeys, dict[str, torch.Size]]:
    """Return the official keys of the recipe's network, and the shapes of its official checkpoint by key."""
    config = RECIPES[recipe]().model
    keys = detectors.official_keys(config)
    with torch.device("meta"):
        return keys, keys.shapes(detectors.build(config).state_dict())


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Turn published checkpoints into teachers, or say which recipe a checkpoint fits."""
    parser = argparse.ArgumentParser(prog="python -m train.official", description=main.__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("inspect", help="say which recipe a checkpoint fits, or how it differs").add_argument("file", type=Path)
    converting = commands.add_parser("convert", help="turn a published checkpoint into a teacher")
    converting.add_argument("--checkpoint", type=Path, required=True, help="mmcv-style .pth file")
    converting.add_argument("--teacher", type=Path, required=True, help="file to write")
    add_settings(converting)
    args = parser.parse_args(argv)
    if args.command == "inspect":
        sys.stdout.write(f"{args.file}: {inspect(args.file)}\n")
    else:
        artifact.require_target(args.teacher, args.checkpoint)
        sys.stdout.write(f"{args.teacher}: {convert(args.checkpoint, args.teacher, args.settings)}\n")


if __name__ == "__main__":
    main()
