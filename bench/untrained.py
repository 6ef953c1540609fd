"""Writes a teacher with random weights, to try networks of official size: `python -m bench.untrained --recipe base --teacher F`."""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

from qdbev import artifact, detectors
from qdbev.command import add_settings, entry_point
from qdbev.config import Config, override, to_dict
from qdbev.data.image_transform import image_transform
from qdbev.data.noise_frames import PIXEL_STD
from qdbev.detector import Detector
from qdbev.facts import TeacherFacts
from qdbev.nn.image_encoder import Bottleneck
from qdbev.ops.deform_conv import DeformConv2d
from qdbev.recipes import RECIPES

_RESIDUAL_GAIN = 0.3
"""Scale of each residual branch. With it 33 branches increase the activations a few times; without it, ten thousand times."""
_DEFORMATION = 0.3
"""Pixels by which a unit activation moves a sampling point of a deformable convolution. With much more, rounding errors are amplified."""
_FROM_ZERO, _PREDICTION_STD = ("sampling_offsets.weight", "attention_weights.weight"), 0.02
"""Ends of the names of weights that training initialises to zero, which would hide errors, and their standard deviation here."""


def untrained(config: Config) -> Detector:
    """A network in which every weight has an effect and activations stay near one. The weights depend only on `config.seed`."""
    torch.manual_seed(config.seed)
    model = detectors.build(config.model)
    with torch.no_grad():
        model.backbone.conv1.weight.mul_(statistics.mean(config.data.std) / PIXEL_STD)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, _RESIDUAL_GAIN)
        if isinstance(module, DeformConv2d):
            nn.init.normal_(module.offset.weight, std=_DEFORMATION * module.offset.weight[0].numel() ** -0.5)
            nn.init.normal_(module.offset.bias, std=_DEFORMATION)
    for name, parameter in model.named_parameters():
        if name.endswith(_FROM_ZERO):
            nn.init.normal_(parameter, std=_PREDICTION_STD)
    return model


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Write a teacher with random weights."""
    parser = argparse.ArgumentParser(prog="python -m bench.untrained", description=main.__doc__)
    parser.add_argument("--recipe", required=True, choices=RECIPES)
    parser.add_argument("--teacher", type=Path, required=True, help="file to write")
    add_settings(parser)
    args = parser.parse_args(argv)
    artifact.require_target(args.teacher)
    config = override(RECIPES[args.recipe](), args.settings)
    facts = TeacherFacts(image_hw=image_transform(config.data, config.data.stored_hw).padded_hw, untrained=True)
    weights = untrained(config).state_dict()
    artifact.save_checkpoint(args.teacher, config=to_dict(config), weights=weights, parent=None, facts=facts)
    sys.stdout.write(f"{args.teacher}: {args.recipe}, random weights\n")


if __name__ == "__main__":
    main()
