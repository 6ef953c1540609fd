"""Which layer gets how many bits: the least harm within a budget, exactly.

Harms of layers are taken to add up, as HAWQ-V2 does (arXiv:1911.03852, section 3.2), which makes the choice a knapsack with one option
for each layer: an integer program that scipy's HiGHS solves in milliseconds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array


class Option(NamedTuple):
    """One width of a layer: what it costs (bytes, bit operations, ...) and what harm it does."""

    bits: int
    cost: float
    harm: float


def allocate_bits(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, int]:
    """Bits of every layer, by name, with a total cost of at most `budget`.

    Raises:
        ValueError: Even the cheapest options exceed the budget.
    """
    cheapest = sum(min(option.cost for option in choices) for choices in options.values())
    if cheapest > budget:
        raise ValueError(f"the budget is {budget:.6g}, but the cheapest widths already cost {cheapest:.6g}; allow more, or fewer bits")
    flat = [(row, option) for row, choices in enumerate(options.values()) for option in choices]
    columns = np.arange(len(flat))
    one_each = csr_array((np.ones(len(flat)), ([row for row, _ in flat], columns)), shape=(len(options), len(flat)))
    cost = np.array([[option.cost for _, option in flat]]) / budget  # of order one, as the solver's tolerances want it
    harm = np.array([option.harm for _, option in flat])
    solved = milp(
        harm / max(np.abs(harm).max(), 1e-30),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost, -np.inf, 1)],
    )
    assert solved.success, solved.message
    taken = [option.bits for (_, option), share in zip(flat, solved.x, strict=True) if share > 0.5]
    return dict(zip(options, taken, strict=True))
