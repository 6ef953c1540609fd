"""Which layer gets how many bits: the least harm within a budget.

Harms of layers are taken to add up, as HAWQ-V2 does (arXiv:1911.03852, section 3.2). With a price on cost every layer chooses for itself;
the price is the lowest that keeps the budget, and what is left over is spent where it helps most.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

_HALVINGS = 60


class Option(NamedTuple):
    """One width of a layer: what it costs (bytes, bit operations, ...) and what harm it does."""

    bits: int
    cost: float
    harm: float


def assign(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, int]:
    """Bits of every layer, by name, with a total cost of at most `budget`.

    Raises:
        ValueError: Even the cheapest options exceed the budget.
    """
    cheapest = sum(min(option.cost for option in choices) for choices in options.values())
    if cheapest > budget:
        raise ValueError(f"the budget is {budget:.6g}, but the cheapest widths already cost {cheapest:.6g}; allow more, or fewer bits")
    low, high = 0.0, 1.0
    while _total(_priced(options, high)) > budget:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(_priced(options, middle)) <= budget else (middle, high)
    chosen = _priced(options, high)
    while (better := _best_upgrade(options, chosen, budget - _total(chosen))) is not None:
        chosen[better[0]] = better[1]
    return {name: option.bits for name, option in chosen.items()}


def _priced(options: Mapping[str, Sequence[Option]], price: float) -> dict[str, Option]:
    return {name: min(choices, key=lambda option: (option.harm + price * option.cost, option.cost)) for name, choices in options.items()}


def _total(chosen: Mapping[str, Option]) -> float:
    return sum(option.cost for option in chosen.values())


def _best_upgrade(options: Mapping[str, Sequence[Option]], chosen: Mapping[str, Option], left: float) -> tuple[str, Option] | None:
    """The layer and option that save most harm within what is left, None if none does."""
    found, saved = None, 0.0
    for name, choices in options.items():
        for option in choices:
            gain = chosen[name].harm - option.harm
            if gain > saved and option.cost - chosen[name].cost <= left:
                found, saved = (name, option), gain
    return found
