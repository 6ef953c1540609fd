"""All recipes by name, and bit widths of a recipe. A recipe is a function that returns a `Config`."""

import dataclasses
import re
from collections.abc import Callable

from qdbev.config import Config
from qdbev.detectors.bevformer import recipes as bevformer
from qdbev.quant.config import Bits
from qdbev.settings import ConfigError

_EMBEDDING_BITS = 8
"""Bit width of embedding tables beside weights of 4 bits or fewer. At 4 bits the tables alone cost 0.047 of the micro detector's NDS after
calibration, and saved a thirteenth of the packed file."""
RECIPES: dict[str, Callable[[], Config]] = {**bevformer.RECIPES}


def at_bits(config: Config, bits: str) -> Config:
    """The same run at widths like `w4a6`: so many bits for weights and for activations of all groups.

    Weights of 4 bits or fewer bring 8-bit embeddings; at 8 and 8 bits calibration is enough, and the stages of training are dropped.
    First convolution and last linears keep the bits of `quant.edge`.

    Raises:
        ConfigError: Not of this form, or not 2 to 8 bits.
    """
    found = re.fullmatch(r"w([2-8])a([2-8])", bits)
    if found is None:
        raise ConfigError(f"--bits {bits!r}: expected w<bits>a<bits> with 2 to 8 bits each, as w4a6")
    width = Bits(weight=int(found[1]), activation=int(found[2]))
    quant = dataclasses.replace(config.quant, bits=width, group_bits=())
    if width.weight <= 4:
        quant = dataclasses.replace(quant, embedding_bits=_EMBEDDING_BITS)
    if width == Bits(weight=8, activation=8):
        quant = dataclasses.replace(quant, stages=())
    return dataclasses.replace(config, quant=quant)
