"""From a float model to one with quantizers: fold batch norms, swap leaf modules by policy, switch groups on and off.

Knows no network: leaves are found by type, and the policy speaks of them by the names of `named_modules`. A module that adds batch
norm to its convolutions says which belong together in a class attribute `norm_pairs` of (convolution, norm) child names.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from qdbev.config import GROUPS, Bits, QuantConfig
from qdbev.quant.layers import (
    Form,
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


class Row(NamedTuple):
    """One leaf of the model. Bits are None where there is no weight or no quantized input, and both where the layer stays float."""

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    calibrated: bool
    enabled: bool


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold every batch norm's stored statistics and affine into the convolution before it, in place; exact in eval mode.

    Pairs come from `norm_pairs` and from Conv2d followed by BatchNorm2d in an nn.Sequential. The norm becomes an Identity.

    Raises:
        ValueError: A batch norm belongs to no declared pair, or keeps no statistics.
    """
    for module in list(model.modules()):
        for conv_name, norm_name in _norm_pairs(module):
            norm = module.get_submodule(norm_name)
            if isinstance(norm, nn.BatchNorm2d):
                _fold(module.get_submodule(conv_name), norm)
                module.set_submodule(norm_name, nn.Identity())
    left = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if left:
        raise ValueError(f"batch norms that follow no known convolution: {', '.join(left)}; declare them in norm_pairs of their module")
    return model


def prepare(model: nn.Module, policy: QuantConfig) -> nn.Module:
    """Swap the leaves that `policy` quantizes for their quantized forms, in place; parameters and their names stay.

    The quantizers let everything through until `calibrate` gave them a range.

    Raises:
        ValueError: The model is already prepared, a pattern of the policy matches no leaf, or a leaf belongs to no group.
    """
    if quant_layers(model):
        raise ValueError("the model is already prepared; start from the float model")
    leaves = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_leaf(module)}
    own = [chosen.layers for chosen in policy.layer_bits]
    _refuse_unmatched("quant.float_layers, layer_bits and edge_layers", (*policy.float_layers, *own, *policy.edge_layers), leaves)
    swapped: dict[nn.Module, nn.Module] = {}
    for name, leaf in leaves.items():
        form = _form(name, leaf, policy)
        if form is None:
            continue
        if leaf not in swapped:
            swapped[leaf] = _quantized(leaf, form)
        model.set_submodule(name, swapped[leaf])
    return model


def bits_of(name: str, policy: QuantConfig) -> Bits | None:
    """Bits of the leaf `name`, None if it stays float: the first of float_layers, layer_bits, edge_layers and group that matches.

    Raises:
        ValueError: The name matches no pattern and begins with no group.
    """
    if _matches(name, policy.float_layers):
        return None
    for chosen in policy.layer_bits:
        if fnmatchcase(name, chosen.layers):
            return chosen.bits
    if _matches(name, policy.edge_layers):
        return policy.edge
    group = name.partition(".")[0]
    if group not in GROUPS:
        raise ValueError(f"layer {name!r} is in none of the groups {', '.join(GROUPS)}; name it in quant.float_layers to keep it float")
    return getattr(policy, group)


def enable(model: nn.Module, groups: Iterable[str]) -> None:
    """Quantize exactly these groups; the others run in float with their ranges kept.

    A quantizer that layers of several groups share (sharing.py) is on while one of them is.

    Raises:
        ValueError: A group does not exist, or its layers have no range yet.
    """
    groups = tuple(groups)
    unknown = [group for group in groups if group not in GROUPS]
    if unknown:
        raise ValueError(f"no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    layers = dict(quant_layers(model))
    _switch(layers, {name for name in layers if name.partition(".")[0] in groups})


def describe(model: nn.Module) -> list[Row]:
    """One row for every leaf, float or quantized, in the model's order."""
    inside = {id(layer.op) for _, layer in quant_layers(model) if isinstance(layer, QuantOp)}
    return [_row(name, module) for name, module in model.named_modules() if _is_leaf(module) and id(module) not in inside]


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    cells = [("layer", "kind", "W", "A", "state")]
    for row in rows:
        cells.append((row.name, row.kind, str(row.weight_bits or "-"), str(row.activation_bits or "-"), _state(row)))
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _norm_pairs(module: nn.Module) -> list[tuple[str, str]]:
    pairs = list(getattr(module, "norm_pairs", ()))
    if isinstance(module, nn.Sequential):
        children = list(module.named_children())
        for (first, conv), (second, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                pairs.append((first, second))
    return pairs


def _fold(conv: nn.Module, norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * factor
    if norm.affine:
        factor, shift = factor * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    bias = shift if conv.bias is None else conv.bias.double() * factor + shift
    weight = conv.weight.double() * factor.view(-1, *[1] * (conv.weight.dim() - 1))
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)


def _is_leaf(module: nn.Module) -> bool:
    """A layer that is, or may be, quantized. Exact types: a subclass of Conv2d or Linear may compute something else."""
    plain = type(module) in (nn.Conv2d, nn.Linear, nn.Embedding)
    return plain or isinstance(module, QuantLayer) or hasattr(type(module), "quantized_inputs")


def _form(name: str, leaf: nn.Module, policy: QuantConfig) -> Form | None:
    """How the leaf is quantized, None if it stays float. A table that no pattern names has `embedding_bits`."""
    bits = bits_of(name, policy)
    if bits is None or not isinstance(leaf, nn.Embedding):
        return None if bits is None else Form(bits, policy.scale, policy.per_channel)
    if policy.embedding_bits is None:
        return None
    named = _matches(name, (*policy.edge_layers, *(chosen.layers for chosen in policy.layer_bits)))
    return Form(bits if named else Bits(weight=policy.embedding_bits), policy.scale)


def _quantized(leaf: nn.Module, form: Form) -> QuantLayer:
    if isinstance(leaf, nn.Conv2d):
        return QuantConv2d.from_float(leaf, form)
    if isinstance(leaf, nn.Linear):
        return QuantLinear.from_float(leaf, form)
    if isinstance(leaf, nn.Embedding):
        return QuantEmbedding.from_float(leaf, form)
    return QuantOp.from_float(leaf, form)


def _row(name: str, module: nn.Module) -> Row:
    if not isinstance(module, QuantLayer):
        return Row(name, type(module).__name__, None, None, False, False)
    parts, inputs = quantizers(module), activation_quantizers(module)
    kind = type(module.op).__name__ if isinstance(module, QuantOp) else type(module).__name__.removeprefix("Quant")
    weight_bits = module.weight_quantizer.num_bits if isinstance(module, WeightLayer) else None
    input_bits = inputs[0].num_bits if inputs else None
    return Row(name, kind, weight_bits, input_bits, all(q.calibrated for q in parts), all(q.enabled for q in parts))


def _state(row: Row) -> str:
    if row.weight_bits is None and row.activation_bits is None:
        return "float"
    if not row.calibrated:
        return "not calibrated"
    return "on" if row.enabled else "off"


def _switch(layers: dict[str, QuantLayer], on: set[str]) -> None:
    """Switch on the quantizers of the layers named in `on`, and all others off."""
    for name in sorted(on):
        if not all(quantizer.calibrated for quantizer in quantizers(layers[name])):
            raise ValueError(f"layer {name!r} has no range yet; calibrate the model before switching it on")
    wanted = {quantizer for name in on for quantizer in quantizers(layers[name])}
    for layer in layers.values():
        for quantizer in quantizers(layer):
            quantizer.enable_quant() if quantizer in wanted else quantizer.disable_quant()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unmatched(what: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if unmatched:
        raise ValueError(f"{what}: {', '.join(map(repr, unmatched))} match no layer; the layers are {', '.join(names)}")
