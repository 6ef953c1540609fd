"""Starts a training from a published network: its backbone, and its neck if all of the neck fits.

Three kinds of file are accepted, all with the ResNet's usual names (conv1, bn1, layer1.0.conv1, ..., layer1.0.downsample.0):

- a classifier of torchvision, which has an `fc` layer (for `tiny`);
- a caffe network as mmdet converts it, without `fc` and num_batches_tracked, some with a conv1.bias;
- a whole detector, with backbone, neck and head under img_backbone, img_neck, ... or under mmdet's backbone, neck, bbox_head.

The third kind includes r101_dcn_fcos3d_pretrain.pth, from which the official `small` and `base` start: an FCOS3D of mmdetection3d with an
FPN on stages 2 to 4 with five outputs (fundamentalvision/BEVFormer issue 118). Its keys are not published. A sibling of it was made by
renaming backbone to img_backbone (zehuichen123/BEVDistill issue 3), so a neck is loaded only if its prefix belongs to that of the backbone.

Upstream's `load_from` loads each tensor that fits and warns about the others. Here the backbone is loaded whole or refused, and the neck
whole or not at all: `base` loads an FCOS3D's laterals and first four outputs, and `small` nothing of that neck.

The keys show neither the channel order of the images nor which convolution of a bottleneck has the stride. torchvision's networks are for
RGB with the stride on the 3x3 convolution, as `tiny`; `small` and `base` are caffe networks, for BGR with the stride on the first 1x1.
torchvision's ResNet-101 has their keys and is the wrong network for them.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from qdbev.detector import Detector
from qdbev.nn.state_dict import Differences, OfficialKeys, backbone_prefix, key_groups


def load_pretrained(model: Detector, state_dict: Mapping[str, Tensor], keys: OfficialKeys) -> list[str]:
    """Load the backbone of `state_dict` into `model`, and the neck if all of it fits.

    Three things may be absent from the file and then keep their initialisation: num_batches_tracked; the neck; and, if the file's network
    has no deformable convolution, the layers that predict offsets. Those start at zero as in mmdet, which makes a deformable convolution
    a plain one with all nine masks at one half.

    Returns:
        Lines that say what was loaded, what keeps its initialisation and what was ignored.

    Raises:
        ValueError: The file's backbone is not this model's; the message lists the differences and nothing is loaded.
    """
    prefix = backbone_prefix(state_dict)
    if prefix is None:
        raise ValueError("the file holds no bottleneck ResNet, neither under img_backbone or backbone nor without a prefix")
    own = model.state_dict()
    shapes = keys.shapes(own)
    backbone, absent = _backbone(state_dict, shapes, prefix, keys.backbone)
    neck, neck_line = _neck(state_dict, shapes, prefix, keys.neck)
    for key, source in {**backbone, **neck}.items():
        own.update(keys.translate(key, state_dict[source], own))
    model.load_state_dict(own)
    report = [f"backbone: {len(backbone)} tensors loaded", *absent, neck_line, "rest of the detector: keeps its initialisation"]
    loaded = {*backbone.values(), *neck.values()}
    rest = [key for key in state_dict if key not in loaded]
    biases = [key for key in rest if _is_zero_bias(key, state_dict[key], prefix)]
    if biases:
        report.append(f"ignored: {len(biases)} biases of convolutions, all zero ({biases[0]})")
    others = key_groups(key for key in rest if key not in biases)
    return report + [f"ignored: {name} ({len(members)} tensors)" for name, members in others.items()]


def _backbone(
    state_dict: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], prefix: str, official: str
) -> tuple[dict[str, str], list[str]]:
    """Map the official key of each backbone tensor to the file's key, and report each kind of optional tensor that the file lacks."""
    sources = {key: prefix + key.removeprefix(official) for key in shapes if key.startswith(official)}
    counters = [key for key, source in sources.items() if key.endswith("num_batches_tracked") and source not in state_dict]
    plain = not any("conv_offset." in key for key in state_dict)
    offsets = [key for key in sources if plain and "conv_offset." in key]
    for key in (*counters, *offsets):
        del sources[key]
    expected = {source: shapes[key] for key, source in sources.items()}
    found = {
        key: value.shape
        for key, value in state_dict.items()
        if key.startswith(prefix) and not key.startswith("fc.") and not _is_zero_bias(key, value, prefix)
    }
    if differences := Differences(found, expected):
        raise ValueError(f"the file's backbone is not this model's: {differences}")
    lines = []
    if counters:
        lines.append(f"backbone: {len(counters)} num_batches_tracked keep their initialisation, zero; the file has none")
    if offsets:
        lines.append(f"backbone: {len(offsets)} conv_offset tensors keep their initialisation, zero; the file's network is not deformable")
    return sources, lines


def _is_zero_bias(key: str, value: Tensor, prefix: str) -> bool:
    """Return whether a tensor is the all-zero bias of a convolution that has no bias here, as in some files converted from caffe."""
    return key.startswith(prefix) and re.search(r"\b(conv\d|downsample\.0)\.bias$", key) is not None and not value.any()


def _neck(state_dict: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], prefix: str, official: str) -> tuple[dict[str, str], str]:
    """Map the official key of each neck tensor to the file's, or nothing if a tensor does not fit; also returns a line for the report."""
    sources = {key: prefix.replace("backbone", "neck") + key.removeprefix(official) for key in shapes if key.startswith(official)}
    for key, source in sources.items():
        if not prefix or source not in state_dict:
            return {}, f"neck: keeps its initialisation; the file has no {source if prefix else 'neck'}"
        if state_dict[source].shape != shapes[key]:
            there, here = tuple(state_dict[source].shape), tuple(shapes[key])
            return {}, f"neck: keeps its initialisation; {source} is {there} in the file and {here} here"
    return sources, f"neck: {len(sources)} tensors loaded"
