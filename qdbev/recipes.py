"""All recipes by name, and their quantization at other bit widths. A recipe is a function that returns a `Config`."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from qdbev.config import Config, override
from qdbev.detectors.bevformer import recipes as bevformer
from qdbev.quant.config import Bits
from qdbev.settings import ConfigError

_EMBEDDING_BITS = 8
"""Bit width of embedding tables where weights have 4 bits or fewer. Tables of 4 bits alone lowered the micro detector's NDS by 0.047 after
calibration, and made the packed file smaller by only a thirteenth."""
RECIPES: dict[str, Callable[[], Config]] = {**bevformer.RECIPES}
"""Recipes of all detectors, by the name that --recipe takes."""


def at_bits(config: Config, bits: str) -> Config:
    """Return the config with widths like `w4a6`: 4 bits for the weights and 6 bits for the activations of all groups.

    At `w8a8` calibration is enough, so the stages of training are removed. The edge layers keep the bits of `quant.edge`.
    Raises ConfigError if `bits` does not have this form, or is not 2 to 8 bits.
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


def student_config(teacher: Config, bits: str, settings: Sequence[str]) -> Config:
    """Return the config of a student, from that of its teacher, at a policy such as w4a6 and with changed settings.

    Raises ConfigError if a setting would change the network, whose weights are the teacher's.
    """
    config = override(at_bits(teacher, bits), settings)
    if config.model != teacher.model:
        raise ConfigError("--set model.* does not fit a trained network, whose weights were made with the teacher's settings; leave it out")
    return config
