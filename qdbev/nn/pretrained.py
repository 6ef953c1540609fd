"""First weights of a training: the backbone, and the neck where it fits, of a network trained for something else.

Three kinds of file, all with the ResNet's usual names (conv1, bn1, layer1.0.conv1, ..., layer1.0.downsample.0): a classifier of
torchvision (with fc, for `tiny`); a caffe network as mmdet converts it (no fc, no num_batches_tracked; conv1.bias in some, mmdetection's
logs name it); a whole detector, with backbone, neck and head under img_backbone, img_neck, ... or mmdet's backbone, neck, bbox_head.
Of the third kind is r101_dcn_fcos3d_pretrain.pth, from which the official `small` and `base` start: DETR3D's fcos3d.pth without its
optimizer (fundamentalvision/BEVFormer issue 118), an FCOS3D (configs/_base_/models/fcos3d.py of mmdetection3d: an FPN on stages 2 to 4
with five outputs). Its keys are listed nowhere; a sibling was made by renaming backbone to img_backbone (zehuichen123/BEVDistill issue
3), so a neck counts only beside a backbone of the same family of names, as it does upstream.

Upstream's `load_from` is mmcv's non-strict loading: it warns, and takes tensor by tensor what fits. Here the backbone is taken whole or
refused, and the neck whole or not at all: `base` takes an FCOS3D's laterals and first four outputs, `small` nothing of that neck, where
upstream would take one output without its lateral.

The keys show neither the channel order of the images nor where a bottleneck's stride sits. torchvision's networks see RGB and have the
stride on the 3x3 convolution, as `tiny`; `small` and `base` are caffe networks, BGR with the stride on the first 1x1. torchvision's
ResNet-101 fits their keys and is the wrong network for them.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.official import BACKBONE, Differences, backbone_prefix, groups, official_shapes, translate

NECK = "img_neck."


def load_pretrained(model: BEVFormer, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Start `model` from the backbone of `state_dict`, and from its neck if all of it fits.

    Three things may be absent, and then keep their initialisation: num_batches_tracked, the neck, and, when the file's network has no
    deformable convolution, the layers that predict offsets. Those start at zero as in mmdet, which is a plain convolution with all
    nine masks at one half.

    Returns:
        What was loaded, what keeps its initialisation and what was ignored, a line each.

    Raises:
        ValueError: The file's backbone is not this model's; the message lists the differences and nothing is loaded.
    """
    prefix = backbone_prefix(state_dict)
    if prefix is None:
        raise ValueError("the file holds no bottleneck ResNet, neither under img_backbone or backbone nor on its own")
    own = model.state_dict()
    shapes = official_shapes(own)
    backbone, absent = _backbone(state_dict, shapes, prefix)
    neck, neck_line = _neck(state_dict, shapes, prefix)
    for key, source in {**backbone, **neck}.items():
        own.update(translate(key, state_dict[source], own))
    model.load_state_dict(own)
    report = [f"backbone: {len(backbone)} tensors loaded", *absent, neck_line, "encoder, decoder, head: keep their initialisation"]
    loaded = {*backbone.values(), *neck.values()}
    rest = [key for key in state_dict if key not in loaded]
    biases = [key for key in rest if _adds_nothing(key, state_dict[key], prefix)]
    if biases:
        report.append(f"ignored: {len(biases)} biases of convolutions, all zero ({biases[0]})")
    others = groups(key for key in rest if key not in biases)
    return report + [f"ignored: {name} ({len(keys)} tensors)" for name, keys in others.items()]


def _backbone(state_dict: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Official key of each backbone tensor to the file's, and a line for each kind of tensor the file may lack."""
    sources = {key: prefix + key.removeprefix(BACKBONE) for key in shapes if key.startswith(BACKBONE)}
    counters = [key for key, source in sources.items() if key.endswith("num_batches_tracked") and source not in state_dict]
    plain = not any("conv_offset." in key for key in state_dict)
    offsets = [key for key in sources if plain and "conv_offset." in key]
    for key in (*counters, *offsets):
        del sources[key]
    expected = {source: shapes[key] for key, source in sources.items()}
    found = {
        key: value.shape
        for key, value in state_dict.items()
        if key.startswith(prefix) and not _is_classifier(key, prefix) and not _adds_nothing(key, value, prefix)
    }
    if differences := Differences(found, expected):
        raise ValueError(f"the file's backbone is not this model's: {differences}")
    lines = []
    if counters:
        lines.append(f"backbone: {len(counters)} num_batches_tracked keep their initialisation, zero; the file has none")
    if offsets:
        lines.append(f"backbone: {len(offsets)} conv_offset tensors keep their initialisation, zero; the file's network is not deformable")
    return sources, lines


def _is_classifier(key: str, prefix: str) -> bool:
    return not prefix and key.startswith("fc.")


def _adds_nothing(key: str, value: Tensor, prefix: str) -> bool:
    """Whether this is the bias of a convolution that has none here, and zero; out of caffe some come so."""
    return key.startswith(prefix) and re.search(r"\b(conv\d|downsample\.0)\.bias$", key) is not None and not value.any()


def _neck(state_dict: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], prefix: str) -> tuple[dict[str, str], str]:
    """Official key of each neck tensor to the file's, or none of them where one does not fit; and a line that says which."""
    sources = {key: prefix.replace("backbone", "neck") + key.removeprefix(NECK) for key in shapes if key.startswith(NECK)}
    for key, source in sources.items():
        if not prefix or source not in state_dict:
            return {}, f"neck: keeps its initialisation; the file has no {source if prefix else 'neck'}"
        if state_dict[source].shape != shapes[key]:
            there, here = tuple(state_dict[source].shape), tuple(shapes[key])
            return {}, f"neck: keeps its initialisation; {source} is {there} in the file and {here} here"
    return sources, f"neck: {len(sources)} tensors loaded"
