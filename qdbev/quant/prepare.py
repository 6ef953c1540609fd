"""From a float model to one with quantizers: fold batch norms, replace layers by quantized ones, switch groups on and off.

Nothing here knows a particular network. Layers that can be quantized, called leaves, are recognised by their type, and the policy names
them as `named_modules` does. A group is a top-level child of the network. A module in which batch norms follow convolutions lists them in
an attribute `norm_pairs`, as pairs of child names (convolution, norm).
"""

import itertools
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import nn

from qdbev.quant.config import Bits, QuantConfig
from qdbev.quant.layers import (
    QuantConv2d,
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
    QuantOp,
    WeightLayer,
    activation_quantizers,
    quant_layers,
    quantizers,
)

_QUANTIZED = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear, nn.Embedding: QuantEmbedding}
"""Quantized layer of each type of float layer; other leaves are wrapped by `QuantOp`."""


class LeafReport(NamedTuple):
    """How one leaf of a model is quantized. A bit width is None where there is no weight or no quantized input."""

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    state: Literal["float", "not calibrated", "off", "on"]


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold the stored statistics and the affine of every batch norm into the convolution before it, in place; exact in eval mode.

    Pairs of convolution and norm are read from `norm_pairs`, and from nn.Sequential where a BatchNorm2d follows a Conv2d. The norm becomes
    an Identity.

    Raises:
        ValueError: A batch norm belongs to no such pair, or has no running statistics.
    """
    for module in list(model.modules()):
        for conv_name, norm_name in _norm_pairs(module):
            norm = module.get_submodule(norm_name)
            if isinstance(norm, nn.BatchNorm2d):
                _fold(module.get_submodule(conv_name), norm)
                module.set_submodule(norm_name, nn.Identity())
    left = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if left:
        raise ValueError(f"batch norms whose convolution is not known: {', '.join(left)}; list them in norm_pairs of their module")
    return model


def prepare(model: nn.Module, policy: QuantConfig) -> nn.Module:
    """Replace the leaves that `policy` quantizes by quantized layers, in place; parameters and their names stay.

    The quantizers return their inputs unchanged until `calibrate` gives them ranges.

    Raises:
        ValueError: The model is already prepared, or a pattern or group of the policy matches no leaf.
    """
    if quant_layers(model):
        raise ValueError("the model is already prepared; start from the float model")
    leaves = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_leaf(module)}
    _refuse_unmatched((*policy.float_layers, *(chosen.layers for chosen in policy.layer_bits), *policy.edge_layers), leaves)
    _refuse_unknown_groups([entry.group for entry in policy.group_bits], dict.fromkeys(map(_group_of, leaves)))
    swapped: dict[nn.Module, nn.Module] = {}
    for name, leaf in leaves.items():
        bits = _leaf_bits(name, leaf, policy)
        if bits is not None:
            if leaf not in swapped:
                swapped[leaf] = _QUANTIZED.get(type(leaf), QuantOp).from_float(leaf, bits, policy)
            model.set_submodule(name, swapped[leaf])
    return model


def bits_of(name: str, policy: QuantConfig) -> Bits | None:
    """Bit widths of the leaf `name` under `policy`, None if it stays float; `QuantConfig` says which of its settings decides."""
    if _matches(name, policy.float_layers):
        return None
    for chosen in policy.layer_bits:
        if fnmatchcase(name, chosen.layers):
            return chosen.bits
    if _matches(name, policy.edge_layers):
        return policy.edge
    return next((entry.bits for entry in policy.group_bits if entry.group == _group_of(name)), policy.bits)


def enable(model: nn.Module, groups: Iterable[str]) -> None:
    """Quantize exactly these groups, which are top-level children of `model`; the others run in float and keep their ranges.

    A quantizer that layers of several groups share (calibrate.py) is on if one of these groups is.

    Raises:
        ValueError: A group does not exist, or its layers have no range yet.
    """
    groups = tuple(groups)
    _refuse_unknown_groups(groups, [name for name, _ in model.named_children()])
    on = [(name, layer) for name, layer in quant_layers(model) if _group_of(name) in groups]
    for name, layer in on:
        if not all(quantizer.calibrated for quantizer in quantizers(layer)):
            raise ValueError(f"layer {name!r} has no range yet; calibrate the model before switching it on")
    wanted = {quantizer for _, layer in on for quantizer in quantizers(layer)}
    for _, layer in quant_layers(model):
        for quantizer in quantizers(layer):
            quantizer.enable_quant() if quantizer in wanted else quantizer.disable_quant()


def describe(model: nn.Module) -> list[LeafReport]:
    """A report of every leaf, float or quantized, in the order of `named_modules`."""
    wrapped = {id(layer.op) for _, layer in quant_layers(model) if isinstance(layer, QuantOp)}
    return [_report(name, module) for name, module in model.named_modules() if _is_leaf(module) and id(module) not in wrapped]


def table(reports: list[LeafReport]) -> str:
    """The reports as aligned text with one line for each leaf; W and A are the bits of weight and activation."""
    cells = [("layer", "kind", "W", "A", "state"), *(tuple(str(cell or "-") for cell in report) for report in reports)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _norm_pairs(module: nn.Module) -> list[tuple[str, str]]:
    pairs = list(getattr(module, "norm_pairs", ()))
    if isinstance(module, nn.Sequential):
        for (first, conv), (second, norm) in itertools.pairwise(module.named_children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                pairs.append((first, second))
    return pairs


def _fold(conv: nn.Module, norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded; create it with track_running_stats=True")
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * factor
    if norm.affine:
        factor, shift = factor * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    bias = shift if conv.bias is None else conv.bias.double() * factor + shift
    weight = conv.weight.double() * factor.view(-1, *[1] * (conv.weight.dim() - 1))
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)


def _is_leaf(module: nn.Module) -> bool:
    """True for a layer that is quantized or can be. Types must match exactly: a subclass of Conv2d or Linear may compute something else."""
    return type(module) in _QUANTIZED or isinstance(module, QuantLayer) or hasattr(type(module), "quantized_inputs")


def _leaf_bits(name: str, leaf: nn.Module, policy: QuantConfig) -> Bits | None:
    """As `bits_of`, but an embedding that no pattern names has `embedding_bits`, and none has bits without that setting."""
    bits = bits_of(name, policy)
    if bits is None or not isinstance(leaf, nn.Embedding):
        return bits
    if policy.embedding_bits is None:
        return None
    named = _matches(name, (*policy.edge_layers, *(chosen.layers for chosen in policy.layer_bits)))
    return bits if named else Bits(weight=policy.embedding_bits)


def _report(name: str, module: nn.Module) -> LeafReport:
    if not isinstance(module, QuantLayer):
        return LeafReport(name, type(module).__name__, None, None, "float")
    parts, inputs = quantizers(module), activation_quantizers(module)
    kind = type(module.op).__name__ if isinstance(module, QuantOp) else type(module).__name__.removeprefix("Quant")
    weight_bits = module.weight_quantizer.num_bits if isinstance(module, WeightLayer) else None
    input_bits = inputs[0].num_bits if inputs else None
    state = "not calibrated" if not all(q.calibrated for q in parts) else "on" if all(q.enabled for q in parts) else "off"
    return LeafReport(name, kind, weight_bits, input_bits, state)


def _group_of(name: str) -> str:
    """Name of the top-level child of the network that is, or contains, the leaf `name`."""
    return name.partition(".")[0]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unmatched(patterns: Iterable[str], names: Collection[str]) -> None:
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if unmatched:
        settings = "quant.float_layers, layer_bits and edge_layers"
        raise ValueError(f"{settings}: {', '.join(map(repr, unmatched))} match no layer; the layers are {', '.join(names)}")


def _refuse_unknown_groups(groups: Iterable[str], known: Collection[str]) -> None:
    unknown = [group for group in groups if group not in known]
    if unknown:
        raise ValueError(f"no such group: {', '.join(unknown)}; the groups are {', '.join(known)}")
