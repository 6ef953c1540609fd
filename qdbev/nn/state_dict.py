"""Reads checkpoints of other projects, translates the names of their tensors into ours, and reports tensors that do not fit."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qdbev.detector import Detector

NUM_SHOWN = 20
"""Largest number of lines in a list of differences."""

_PACKED = re.compile(r"(.*)\.[qkv]_proj\.(weight|bias)")
"""Name of a query, key or value projection; nn.MultiheadAttention, which published code uses, stores the three as one tensor."""


class StateDictError(ValueError):
    """Raised for a file that is missing or is no readable checkpoint with finite weights."""


@dataclass(frozen=True, kw_only=True)
class OfficialKeys:
    """How the tensors of a detector's published checkpoints are named, and what they are called in this project.

    Two differences in layout are translated for every detector. A packed `in_proj_weight` or `in_proj_bias` is split into `q_proj`,
    `k_proj` and `v_proj`, and the weight (O, C, 3, 3) of a deformable convolution becomes the (O, 9 * C, 1, 1) of its matrix product.
    """

    names: tuple[tuple[str, str], ...]
    """Pairs (official, ours) of beginnings of names, where # is a number and * any text. The first pair that matches a name applies, and
    a name that no pair matches stays as it is."""
    ignored: tuple[str, ...] = ()
    """Official keys that are no part of the network, such as constants of the loss."""
    backbone: str = "img_backbone."
    """Prefix of the official keys of the image backbone."""
    neck: str = "img_neck."
    """Prefix of the official keys of the neck, which merges the backbone's feature levels."""
    head: str = "pts_bbox_head."
    """Prefix of official keys that only a whole detector has."""

    def translate(self, key: str, value: Tensor, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our tensors, by name, for one official tensor; three for a packed projection. `own` is the model's state dict."""
        name = _rename(key, self.names)
        stem, _, leaf = name.rpartition(".")
        if leaf in ("in_proj_weight", "in_proj_bias"):
            kind = leaf.removeprefix("in_proj_")
            return {f"{stem}.{part}_proj.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        if f"{stem}.product.weight" in own and leaf == "weight":
            return {f"{stem}.product.weight": value.flatten(1)[..., None, None]}
        return {name: value}

    def shapes(self, own: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        """Return the shapes of an official checkpoint of a model by official key, from the model's state dict `own`."""
        shapes = {}
        reverse = tuple((ours, official) for official, ours in self.names)
        for name, value in own.items():
            shape = value.shape
            if packed := _PACKED.fullmatch(name):
                name, shape = f"{packed[1]}.in_proj_{packed[2]}", torch.Size((3 * shape[0], *shape[1:]))
            elif name.endswith(".product.weight"):
                name, shape = name.replace(".product.", "."), torch.Size((shape[0], shape[1] // 9, 3, 3))
            shapes[_rename(name, reverse)] = shape
        return shapes

    def differences(self, state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> "Differences":
        """Compare an official state dict with the shapes that a model expects; ignored keys count as absent."""
        return Differences({key: value.shape for key, value in state_dict.items() if key not in self.ignored}, expected)


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Apply the first pair (beginning, replacement) that matches; # and * are as in `OfficialKeys.names`."""
    for before, after in pairs:
        pattern = re.escape(before).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)")
        if match := re.match(pattern, name):
            return match.expand(re.sub(r"[#*]", r"\\1", after)) + name[match.end() :]
    return name


@dataclass(frozen=True)
class Differences:
    """The tensors in which a file and a model differ, by the file's names; its length is their number, so that no differences are false."""

    found: Mapping[str, torch.Size]
    """Shapes of all tensors of the file."""
    expected: Mapping[str, torch.Size]
    """Shapes of all tensors of the model."""

    @property
    def missing(self) -> list[str]:
        """Keys that the model expects and the file does not have."""
        return [key for key in self.expected if key not in self.found]

    @property
    def unknown(self) -> list[str]:
        """Keys of the file that the model does not have."""
        return [key for key in self.found if key not in self.expected]

    @property
    def reshaped(self) -> list[str]:
        """Keys whose tensor has another shape in the model."""
        return [key for key, shape in self.found.items() if self.expected.get(key, shape) != shape]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unknown) + len(self.reshaped)

    def __str__(self) -> str:
        """Return the counts and a line for each key; a group of keys that is missing or unknown as a whole takes one line."""
        lines = [(f"shape of {key}: {tuple(self.found[key])}, this model has {tuple(self.expected[key])}", 1) for key in self.reshaped]
        lines += _by_group("missing", self.missing, self.expected) + _by_group("unknown", self.unknown, self.found)
        rest = sum(count for _, count in lines[NUM_SHOWN:])
        counts = f"{len(self.missing)} missing, {len(self.unknown)} unknown, {len(self.reshaped)} of another shape"
        more = [f"... and {rest} more"] if rest else []
        shown = (line for line, _ in lines[:NUM_SHOWN])
        return "\n  ".join([f"{len(self)} difference{'s' if len(self) > 1 else ''}: {counts}", *shown, *more])


def _by_group(word: str, keys: list[str], everything: Iterable[str]) -> list[tuple[str, int]]:
    """Return lines that list keys, each with the number of keys that it covers."""
    whole, part = key_groups(everything), key_groups(keys)
    lines = []
    for name, members in part.items():
        if len(members) == len(whole[name]) > 1:
            lines.append((f"{word}: all of {name} ({len(members)} tensors)", len(members)))
        else:
            lines += [(f"{word}: {key}", 1) for key in members]
    return lines


def key_groups(keys: Iterable[str]) -> dict[str, list[str]]:
    """Group keys by the part before their first dot."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(key.partition(".")[0], []).append(key)
    return found


def load_official(model: Detector, state_dict: Mapping[str, Tensor], keys: OfficialKeys) -> None:
    """Load an official state dict. Raises ValueError, and loads nothing, if keys are missing, unknown, or of the wrong shape."""
    own = model.state_dict()
    if differences := keys.differences(state_dict, keys.shapes(own)):
        raise ValueError(f"the checkpoint does not fit this model: {differences}")
    translated: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key not in keys.ignored:
            translated.update(keys.translate(key, value, own))
    model.load_state_dict(translated)


def backbone_prefix(state_dict: Mapping[str, Tensor]) -> str | None:
    """Return the prefix of a bottleneck ResNet's keys in a file, or None if the file has no such network."""
    prefixes = ("img_backbone.", "backbone.", "")  # of detectors on mmdet3d, of detectors of mmdet, and of image classifiers
    return next((prefix for prefix in prefixes if f"{prefix}layer1.0.conv3.weight" in state_dict), None)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the state dict of an mmcv-style checkpoint (under 'state_dict') or of a bare one.

    Raises:
        StateDictError: The file is missing, is no such checkpoint, or holds classes, NaN or infinity.
    """
    if not path.is_file():
        raise StateDictError(f"{path} does not exist; give the path of a .pth checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = "the file is no archive of tensors" if isinstance(error, KeyError) else str(error)  # torch takes other bytes for opcodes
        raise StateDictError(f"{path} cannot be read as a weights-only checkpoint: {_reason(path, text)}") from error
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    entries = state_dict.items() if isinstance(state_dict, dict) else ()
    if not entries or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise StateDictError(f"{path} holds no state dict, but {held or 'nothing'}; give a checkpoint with the network's weights")
    broken = [key for key, value in state_dict.items() if not value.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if broken[1:] else ""
        raise StateDictError(f"{path} has NaN or infinity in {broken[0]}{more}; copy it again or take an earlier epoch")
    if all(key.startswith("module.") for key in state_dict):  # the network was saved from inside DistributedDataParallel
        return {key.removeprefix("module."): value for key, value in state_dict.items()}
    return dict(state_dict)


def _reason(path: Path, error: str) -> str:
    """Explain why torch refused a file, and what to do about it."""
    if refused := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", error):
        load = f"s = torch.load('{path}', map_location='cpu', weights_only=False)"
        save = "torch.save({'state_dict': s.get('state_dict', s)}, 'weights.pth')"
        return (
            f"beside tensors it holds {refused[1]}, and reading such an object can run code from the file. If you trust where it comes "
            f'from, save its tensors alone where that class is installed: python -c "import torch; {load}; {save}"'
        )
    detail = error.partition("WeightsUnpickler error:")[2] or error
    return f"{detail.strip().splitlines()[0][:120] if detail.strip() else 'it is empty or cut short'}; copy or download it again"
