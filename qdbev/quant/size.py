"""Model size, counted twice: the paper's way and honestly."""

import math

from torch import nn

from qdbev.quant.layers import QuantOp, quant_layers
from qdbev.quant.quantizer import Quantizer

FLOAT_BYTES = 4


def paper_bytes(model: nn.Module, weight_bits: int) -> float:
    """Every parameter at `weight_bits`, as QD-BEV's table counts: norms, biases and embeddings included, scales not."""
    steps = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in steps) * weight_bits / 8


def packed_bytes(model: nn.Module) -> int:
    """What a packed file of a prepared model holds: weights at their bits, and in float32 steps, biases and everything else."""
    weights = {id(layer.weight): layer for _, layer in quant_layers(model) if not isinstance(layer, QuantOp)}
    total = 0
    for parameter in model.parameters():
        layer = weights.get(id(parameter))
        if layer is None:
            total += parameter.numel() * FLOAT_BYTES
        else:
            total += math.ceil(parameter.numel() * layer.weight_quantizer.num_bits / 8)
    return total + sum(buffer.numel() * FLOAT_BYTES for buffer in model.buffers())
