"""Official checkpoint keys to ours and back; every key is accounted for.

    python -m qdbev.detectors.bevformer.official inspect FILE      says which recipe a checkpoint fits

Source of the key names: fundamentalvision/BEVFormer at 66b65f3 on mmdet3d 0.17.1.
"""

import argparse
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qdbev.artifact import ArtifactError
from qdbev.command import entry_point
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.recipes import RECIPES

LOSS_CONSTANT = "pts_bbox_head.code_weights"
"""In official state dicts, but no part of the network: the criterion's weights of the ten box codes."""

BACKBONE = "img_backbone."
BACKBONE_PREFIXES = (BACKBONE, "backbone.", "")
"""Where a ResNet lies in the files of BEVFormer and its kin, of mmdet's own detectors, and of plain classifiers."""

SHOWN = 20
"""Lines of a list of differences."""

_HEAD = "pts_bbox_head."
_TRANSFORMER = _HEAD + "transformer."
_NAMES = (
    ("img_backbone.*conv2.conv_offset.", "backbone.*conv2.offset."),
    ("img_backbone.", "backbone."),
    ("img_neck.lateral_convs.#.conv.", "neck.lateral.#."),
    ("img_neck.fpn_convs.#.conv.", "neck.output.#."),
    (_HEAD + "positional_encoding.row_embed.", "encoder.row_embed."),
    (_HEAD + "positional_encoding.col_embed.", "encoder.col_embed."),
    (_HEAD + "bev_embedding.", "encoder.bev_embedding."),
    (_HEAD + "query_embedding.", "decoder.query_embedding."),
    (_HEAD + "cls_branches.", "head.cls_branches."),
    (_HEAD + "reg_branches.", "head.reg_branches."),
    (_TRANSFORMER + "level_embeds", "encoder.level_embed"),
    (_TRANSFORMER + "cams_embeds", "encoder.camera_embed"),
    (_TRANSFORMER + "can_bus_mlp.norm.", "encoder.can_bus_norm."),
    (_TRANSFORMER + "can_bus_mlp.", "encoder.can_bus_mlp."),
    (_TRANSFORMER + "reference_points.", "decoder.reference_points."),
    (_TRANSFORMER + "encoder.layers.#.attentions.0.", "encoder.layers.#.temporal."),
    (_TRANSFORMER + "encoder.layers.#.attentions.1.", "encoder.layers.#.spatial."),
    (_TRANSFORMER + "decoder.layers.#.attentions.0.attn.", "decoder.layers.#.self_attention."),
    (_TRANSFORMER + "decoder.layers.#.attentions.1.", "decoder.layers.#.cross_attention."),
    *(
        (f"{_TRANSFORMER}{room}.layers.#.{theirs}.", f"{room}.layers.#.{ours}.")
        for room in ("encoder", "decoder")
        for theirs, ours in (("ffns.0.layers.0.0", "ffn.linear1"), ("ffns.0.layers.1", "ffn.linear2"), ("norms", "norms"))
    ),
)
"""How names begin, theirs and ours; # is a number and * anything. The first pair that fits counts."""


def _rules(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[re.Pattern[str], str], ...]:
    rules = []
    for before, after in pairs:
        pattern = re.escape(before).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)")
        rules.append((re.compile("^" + pattern), re.sub(r"[#*]", r"\\1", after)))
    return tuple(rules)


_TO_OURS = _rules(_NAMES)
_TO_THEIRS = _rules((ours, theirs) for theirs, ours in _NAMES)
_PACKED = re.compile(r"(.*)\.[qkv]_proj\.(weight|bias)")


def _rename(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name


def translate(key: str, value: Tensor, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and values for one official entry; more than one where a packed projection is split."""
    name = _rename(key, _TO_OURS)
    stem, _, leaf = name.rpartition(".")
    if leaf in ("in_proj_weight", "in_proj_bias"):
        kind = leaf.removeprefix("in_proj_")
        return {f"{stem}.{part}_proj.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
    if f"{stem}.product.weight" in own and leaf == "weight":
        return {f"{stem}.product.weight": value.flatten(1)[..., None, None]}
    return {name: value}


def official_shapes(own: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Official key and shape of everything that a state dict of ours holds."""
    shapes = {}
    for name, value in own.items():
        shape = value.shape
        if packed := _PACKED.fullmatch(name):
            name, shape = f"{packed[1]}.in_proj_{packed[2]}", torch.Size((3 * shape[0], *shape[1:]))
        elif name.endswith(".product.weight"):
            name, shape = name.replace(".product.", "."), torch.Size((shape[0], shape[1] // 9, 3, 3))
        shapes[_rename(name, _TO_THEIRS)] = shape
    return shapes


@dataclass(frozen=True)
class Differences:
    """How the tensors of a file differ from what a model takes, in the file's names."""

    found: Mapping[str, torch.Size]
    expected: Mapping[str, torch.Size]

    @property
    def missing(self) -> list[str]:
        """Keys the file should have."""
        return [key for key in self.expected if key not in self.found]

    @property
    def unknown(self) -> list[str]:
        """Keys the model has no place for."""
        return [key for key in self.found if key not in self.expected]

    @property
    def reshaped(self) -> list[str]:
        """Keys whose tensor has another shape in the model."""
        return [key for key, shape in self.found.items() if self.expected.get(key, shape) != shape]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unknown) + len(self.reshaped)

    def __str__(self) -> str:
        """Counts, then a line each; a group of keys that is missing or unknown as a whole takes one line."""
        lines = [(f"shape of {key}: {tuple(self.found[key])}, this model has {tuple(self.expected[key])}", 1) for key in self.reshaped]
        lines += _by_group("missing", self.missing, self.expected) + _by_group("unknown", self.unknown, self.found)
        rest = sum(count for _, count in lines[SHOWN:])
        counts = f"{len(self.missing)} missing, {len(self.unknown)} unknown, {len(self.reshaped)} of another shape"
        more = [f"... and {rest} more"] if rest else []
        return "\n  ".join([f"{len(self)} difference{'s' if len(self) > 1 else ''}: {counts}", *(line for line, _ in lines[:SHOWN]), *more])


def _by_group(word: str, keys: list[str], everything: Iterable[str]) -> list[tuple[str, int]]:
    """Lines and how many keys each stands for."""
    whole, part = groups(everything), groups(keys)
    lines = []
    for name, members in part.items():
        if len(members) == len(whole[name]) > 1:
            lines.append((f"{word}: all of {name} ({len(members)} tensors)", len(members)))
        else:
            lines += [(f"{word}: {key}", 1) for key in members]
    return lines


def groups(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys by what stands before their first dot."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(key.partition(".")[0], []).append(key)
    return found


def load_official(model: BEVFormer, state_dict: Mapping[str, Tensor]) -> None:
    """Load an official state dict into `model`.

    Raises:
        ValueError: A key is missing, unknown, or of the wrong shape; the message lists them and nothing is loaded.
    """
    own = model.state_dict()
    if differences := _differences(state_dict, official_shapes(own)):
        what = initialisation(state_dict)
        raise ValueError(f"the checkpoint does not fit this model: {differences}" + (f"\nit is {what}" if what else ""))
    translated: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key != LOSS_CONSTANT:
            translated.update(translate(key, value, own))
    model.load_state_dict(translated)


def _differences(state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> Differences:
    return Differences({key: value.shape for key, value in state_dict.items() if key != LOSS_CONSTANT}, expected)


@functools.cache
def _recipe_shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return official_shapes(BEVFormer(RECIPES[name]().model).state_dict())


def fitting_recipe(state_dict: Mapping[str, Tensor]) -> str:
    """Name of the recipe whose model `state_dict` fits.

    Raises:
        ValueError: It fits none; the message says what it is, or which recipe is nearest and how it differs.
    """
    differences = {name: _differences(state_dict, _recipe_shapes(name)) for name in RECIPES}
    nearest = min(differences, key=lambda name: len(differences[name]))
    if not differences[nearest]:
        return nearest
    if what := initialisation(state_dict):
        raise ValueError(f"this is no BEVFormer but {what}")
    raise ValueError(f"these {len(state_dict)} tensors fit none of {', '.join(RECIPES)}; nearest is {nearest}, with {differences[nearest]}")


def backbone_prefix(state_dict: Mapping[str, Tensor]) -> str | None:
    """What stands before the keys of the bottleneck ResNet in a file, or None where it holds none."""
    return next((prefix for prefix in BACKBONE_PREFIXES if f"{prefix}layer1.0.conv3.weight" in state_dict), None)


def initialisation(state_dict: Mapping[str, Tensor]) -> str | None:
    """What a file without BEVFormer's head can start a training of; None for a file with that head or without a ResNet."""
    prefix = backbone_prefix(state_dict)
    if prefix is None or any(key.startswith(_HEAD) for key in state_dict):
        return None
    blocks = {match.groups() for key in state_dict if (match := re.match(re.escape(prefix) + r"layer(\d+)\.(\d+)\.", key))}
    stages = [stage for stage, _ in blocks]
    depths = tuple(stages.count(stage) for stage in sorted(set(stages)))
    deformable = " with deformable convolutions" if any("conv_offset." in key for key in state_dict) else ""
    recipes = [name for name, recipe in RECIPES.items() if recipe().model.backbone.depths == depths]
    use = f"use python -m train.teacher --recipe {' or '.join(recipes)} --pretrained" if recipes else "no recipe has such a backbone"
    return f"a ResNet-{3 * sum(depths) + 2} initialisation{deformable}, without pts_bbox_head: {use}"


def read_official(path: Path) -> dict[str, Tensor]:
    """State dict of an mmcv-style checkpoint ('state_dict' beside 'meta' and 'optimizer') or of a bare one.

    Raises:
        ArtifactError: The file is missing, is no such checkpoint, or holds classes, NaN or infinity.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read as a weights-only checkpoint: {_reason(path, str(error))}") from error
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ArtifactError(f"{path} holds no state dict, but {held or 'nothing'}")
    broken = [key for key, value in state_dict.items() if not value.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if broken[1:] else ""
        raise ArtifactError(f"{path} has NaN or infinity in {broken[0]}{more}; copy it again or take an earlier epoch")
    if all(key.startswith("module.") for key in state_dict):  # saved from inside DistributedDataParallel
        return {key.removeprefix("module."): value for key, value in state_dict.items()}
    return dict(state_dict)


def _reason(path: Path, error: str) -> str:
    """Why torch refused a file, and what to do about it."""
    if refused := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", error):
        load = f"s = torch.load('{path}', map_location='cpu', weights_only=False)"
        save = "torch.save({'state_dict': s.get('state_dict', s)}, 'weights.pth')"
        return (
            f"beside tensors it holds {refused[1]}, and reading such an object can run code from the file. If you trust where it comes "
            f'from, save its tensors alone where that class is installed: python -c "import torch; {load}; {save}"'
        )
    detail = error.partition("WeightsUnpickler error:")[2] or error
    return f"{detail.strip().splitlines()[0][:120] if detail.strip() else 'it is empty or cut short'}; copy or download it again"


@entry_point
def main() -> None:
    """Say which recipe a checkpoint fits."""
    parser = argparse.ArgumentParser(prog="python -m qdbev.detectors.bevformer.official", description=main.__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("inspect", help="say which recipe a checkpoint fits").add_argument("file", type=Path)
    path = parser.parse_args().file
    state_dict = read_official(path)
    what = initialisation(state_dict)
    if what is None:
        parameters = sum(value.numel() for key, value in state_dict.items() if "running_" not in key and "num_batches" not in key)
        what = f"{fitting_recipe(state_dict)}, {len(state_dict)} tensors, {parameters / 1e6:.2f} M parameters"
    sys.stdout.write(f"{path}: {what}\n")


if __name__ == "__main__":
    main()
