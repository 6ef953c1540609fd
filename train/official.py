"""Official checkpoint in, sealed teacher out.

python -m train.official --checkpoint bevformer_tiny_epoch_24.pth --teacher runs/tiny/teacher.pt
"""

import argparse
import sys
from pathlib import Path

from qdbev import artifact, detectors
from qdbev.command import add_settings, entry_point
from qdbev.config import override, to_dict
from qdbev.data.image_transform import image_transform
from qdbev.detectors.bevformer.official import fitting_recipe, load_official, read_official
from qdbev.facts import TeacherFacts
from qdbev.recipes import RECIPES


def convert(checkpoint: Path, teacher: Path, settings: list[str]) -> str:
    """Write the teacher of a published checkpoint; the name of the recipe it fits.

    Raises:
        ArtifactError: The file is no checkpoint.
        ValueError: Its tensors fit no recipe.
    """
    state_dict = read_official(checkpoint)
    name = fitting_recipe(state_dict)
    config = override(RECIPES[name](), settings)
    model = detectors.build(config.model)
    load_official(model, state_dict)
    image_hw = image_transform(config.data, config.data.stored_hw).padded_hw
    facts = TeacherFacts(image_hw=image_hw, official=artifact.sha256(checkpoint))
    artifact.save_checkpoint(teacher, config=to_dict(config), weights=model.state_dict(), parent=None, facts=facts)
    return name


@entry_point
def main() -> None:
    """Turn a published BEVFormer checkpoint into a teacher."""
    parser = argparse.ArgumentParser(prog="python -m train.official", description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="mmcv-style .pth")
    parser.add_argument("--teacher", type=Path, required=True, help="file to write")
    add_settings(parser)
    args = parser.parse_args()
    sys.stdout.write(f"{args.teacher}: {convert(args.checkpoint, args.teacher, args.settings)}\n")


if __name__ == "__main__":
    main()
