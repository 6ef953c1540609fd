"""What the tests of the attention operators in PyTorch share, with and without a GPU."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from plugins.attention.cases import SIZES, Case, draw, level_attribute
from plugins.attention.variant import Variant
from qdbev.ops.contract import MSDA, SCA
from qdbev.ops.msda import multi_scale_deformable_attention
from qdbev.ops.sca import spatial_cross_attention

OPERATORS = {SCA: spatial_cross_attention, MSDA: multi_scale_deformable_attention}
BOTH = [SIZES[0], SIZES[5]]
"""Sizes of spatial cross-attention and of multi-scale deformable attention."""
ONE_LEVEL = [SIZES[1], SIZES[4]]
"""Sizes of both operators with one level, which are quick to trace."""


def problem(sizes: Variant, seed: int = 0, **settings: int) -> Case:
    return draw("", sizes, Generator().manual_seed(seed), **settings)


def inputs(case: Case, with_gradient: bool, device: str = "cpu") -> list[Tensor]:
    """Return the operator's inputs on a device. `with_gradient` lets all of them but `visible` require a gradient."""
    return [x.to(device).requires_grad_(with_gradient and x is not case.visible) for x in (case.value, *case.others())]


def registered(sizes: Variant) -> Callable[..., Tensor]:
    return getattr(torch.ops.qdbev, sizes.operator.torch_name)


def flat(sizes: Variant) -> list[int]:
    return level_attribute(sizes)["level_hw"]
