"""Model size, counted twice: the paper's way and honestly."""

from collections import Counter

from torch import nn

from qdbev.quant.pack import Part, pack, parts
from qdbev.quant.quantizer import Quantizer


def paper_bytes(model: nn.Module, weight_bits: int) -> float:
    """Every parameter at `weight_bits`, as QD-BEV's table counts: norms, biases and embeddings included, scales not."""
    steps = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in steps) * weight_bits / 8


def packed_bytes(model: nn.Module) -> int:
    """Length of the packed form (pack.py) of a prepared model: everything that its detections depend on, except its config."""
    return len(pack(model))


def packed_parts(model: nn.Module) -> dict[Part, int]:
    """Bytes of the packed form by what they hold, before it is deflated: 4-bit values two a byte."""
    counts: Counter[Part] = Counter()
    for part, data in parts(model):
        counts[part] += len(data)
    return dict(counts)
