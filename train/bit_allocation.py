"""Allocates bit widths to layers so that the loss increases least within a cost budget.

The increases of single layers are assumed to add up, as HAWQ-V2 does (arXiv:1911.03852, section 3.2). The choice is then a knapsack
problem with one option for each layer: an integer program that scipy's HiGHS solves exactly in milliseconds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


class Option(NamedTuple):
    """One bit width of a layer, with its cost (bytes, bit operations, ...) and the increase of the loss that it causes."""

    bits: int
    cost: float
    loss_increase: float


def allocate_bits(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, int]:
    """Choose one option for each layer so that the total cost is at most `budget` and the total loss increase is smallest.

    Options and the returned bits are given by layer name.

    Raises:
        ValueError: Even the cheapest options exceed the budget.
    """
    cheapest = sum(min(option.cost for option in choices) for choices in options.values())
    if cheapest > budget:
        raise ValueError(f"the budget is {budget:.6g}, but the cheapest widths already cost {cheapest:.6g}; allow more, or fewer bits")
    flat = [(row, option) for row, choices in enumerate(options.values()) for option in choices]
    columns = np.arange(len(flat))
    one_each = csr_array((np.ones(len(flat)), ([row for row, _ in flat], columns)), shape=(len(options), len(flat)))
    cost = np.array([[option.cost for _, option in flat]]) / budget  # scaled to order one, which the solver's tolerances require
    loss_increase = np.array([option.loss_increase for _, option in flat])
    solved = milp(
        loss_increase / max(np.abs(loss_increase).max(), 1e-30),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost, -np.inf, 1)],
    )
    assert solved.success, solved.message
    taken = [option.bits for (_, option), share in zip(flat, solved.x, strict=True) if share > 0.5]
    return dict(zip(options, taken, strict=True))
