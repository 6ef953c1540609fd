"""Size of a quantized model, counted in two ways: as the QD-BEV paper counts it, and in bytes that really store the model."""

from collections import Counter

from torch import nn

from qdbev.quant.pack import Part, pack, parts
from qdbev.quant.quantizer import Quantizer


def paper_bytes(model: nn.Module, weight_bits: int) -> float:
    """Bytes of all parameters at `weight_bits` each, as the table of QD-BEV (arXiv:2308.10515) counts: with norms, biases and embeddings,
    without quantization steps."""
    steps = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in steps) * weight_bits / 8


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the packed form (pack.py) of a prepared model, which is everything that its detections depend on except its config."""
    return len(pack(model))


def packed_parts(model: nn.Module) -> dict[Part, int]:
    """Bytes of the packed form by kind of content, before compression; two 4-bit values take one byte."""
    counts: Counter[Part] = Counter()
    for part, data in parts(model):
        counts[part] += len(data)
    return dict(counts)
