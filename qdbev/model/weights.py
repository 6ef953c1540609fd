"""Official checkpoint keys to ours; every key is accounted for.

    python -m qdbev.model.weights FILE      says which recipe a checkpoint fits

Source of the key names: fundamentalvision/BEVFormer at 66b65f3 on mmdet3d 0.17.1.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from qdbev.artifact import ArtifactError
from qdbev.command import entry_point
from qdbev.model.bevformer import BEVFormer
from qdbev.recipes import RECIPES

LOSS_CONSTANT = "pts_bbox_head.code_weights"
"""In official state dicts, but no part of the network: the criterion's weights of the ten box codes."""

_HEAD = r"^pts_bbox_head\."
_LAYER = _HEAD + r"transformer\.(encoder|decoder)\.layers\.(\d+)\."
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^img_backbone\.(.*conv2)\.conv_offset\.", r"backbone.\1.offset."),
        (r"^img_backbone\.", "backbone."),
        (r"^img_neck\.lateral_convs\.(\d+)\.conv\.", r"neck.lateral.\1."),
        (r"^img_neck\.fpn_convs\.(\d+)\.conv\.", r"neck.output.\1."),
        (_HEAD + r"positional_encoding\.", "encoder."),
        (_HEAD + r"transformer\.level_embeds$", "encoder.level_embed"),
        (_HEAD + r"transformer\.cams_embeds$", "encoder.camera_embed"),
        (_HEAD + r"transformer\.can_bus_mlp\.norm\.", "encoder.can_bus_norm."),
        (_HEAD + r"transformer\.can_bus_mlp\.", "encoder.can_bus_mlp."),
        (_HEAD + r"transformer\.reference_points\.", "decoder.reference_points."),
        (_HEAD + r"bev_embedding\.", "encoder.bev_embedding."),
        (_HEAD + r"query_embedding\.", "decoder.query_embedding."),
        (_HEAD + r"(cls|reg)_branches\.", r"head.\1_branches."),
        (_HEAD + r"transformer\.encoder\.layers\.(\d+)\.attentions\.0\.", r"encoder.layers.\1.temporal."),
        (_HEAD + r"transformer\.encoder\.layers\.(\d+)\.attentions\.1\.", r"encoder.layers.\1.spatial."),
        (_HEAD + r"transformer\.decoder\.layers\.(\d+)\.attentions\.0\.attn\.", r"decoder.layers.\1.self_attention."),
        (_HEAD + r"transformer\.decoder\.layers\.(\d+)\.attentions\.1\.", r"decoder.layers.\1.cross_attention."),
        (_LAYER + r"ffns\.0\.layers\.0\.0\.", r"\1.layers.\2.ffn.linear1."),
        (_LAYER + r"ffns\.0\.layers\.1\.", r"\1.layers.\2.ffn.linear2."),
        (_LAYER + r"norms\.", r"\1.layers.\2.norms."),
    )
)


def load_official(model: BEVFormer, state_dict: dict[str, Tensor]) -> None:
    """Load an official state dict into `model`.

    Raises:
        ValueError: A key is missing, unknown, or of the wrong shape; the message lists them and nothing is loaded.
    """
    own = model.state_dict()
    translated: dict[str, Tensor] = {}
    unknown = []
    for key, value in state_dict.items():
        if key == LOSS_CONSTANT:
            continue
        pieces = translate(key, value, own)
        unknown += [key for name in pieces if name not in own]
        translated.update(pieces)
    problems = [f"unknown: {key}" for key in unknown]
    problems += [f"missing: {key}" for key in own if key not in translated]
    problems += [
        f"shape of {key}: {tuple(translated[key].shape)}, this model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in translated and translated[key].shape != value.shape
    ]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"the checkpoint does not fit this model ({len(problems)} differences):\n  " + "\n  ".join(problems[:20]) + more)
    model.load_state_dict(translated)


def read_official(path: Path) -> dict[str, Tensor]:
    """State dict of an mmcv-style checkpoint ('state_dict' beside 'meta' and 'optimizer') or of a bare one.

    Raises:
        ArtifactError: The file is missing or is no such checkpoint.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read as a weights-only checkpoint: {str(error).splitlines()[0]}") from error
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ArtifactError(f"{path} holds no state dict")
    return state_dict


def fitting_recipe(state_dict: dict[str, Tensor]) -> str:
    """Name of the recipe whose model `state_dict` fits.

    Raises:
        ValueError: It fits none.
    """
    for name, recipe in RECIPES.items():
        with torch.device("meta"):
            model = BEVFormer(recipe().model)
        own = model.state_dict()
        translated = {}
        for key, value in state_dict.items():
            if key != LOSS_CONSTANT:
                translated.update(translate(key, value, own))
        if {k: v.shape for k, v in translated.items()} == {k: v.shape for k, v in own.items()}:
            return name
    raise ValueError(f"these {len(state_dict)} tensors fit none of {', '.join(RECIPES)}")


def translate(key: str, value: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and values for one official entry; more than one where a packed projection is split."""
    name = key
    for pattern, replacement in _RULES:
        name, count = pattern.subn(replacement, key)
        if count:
            break
    stem, _, leaf = name.rpartition(".")
    if leaf in ("in_proj_weight", "in_proj_bias"):
        kind = leaf.removeprefix("in_proj_")
        return {f"{stem}.{part}_proj.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
    if f"{stem}.product.weight" in own and leaf == "weight":
        return {f"{stem}.product.weight": value.flatten(1)[..., None, None]}
    return {name: value}


@entry_point
def main() -> None:
    """Say which recipe a checkpoint fits."""
    parser = argparse.ArgumentParser(prog="python -m qdbev.model.weights", description=main.__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("inspect", help="say which recipe a checkpoint fits").add_argument("file", type=Path)
    path = parser.parse_args().file
    state_dict = read_official(path)
    name = fitting_recipe(state_dict)
    parameters = sum(value.numel() for key, value in state_dict.items() if "running_" not in key and "num_batches" not in key)
    sys.stdout.write(f"{path}: {name}, {len(state_dict)} tensors, {parameters / 1e6:.2f} M parameters\n")


if __name__ == "__main__":
    main()
