"""The allocation of bits is the best of all possible ones where all can be tried, and never exceeds the budget."""

import itertools

import numpy as np
import pytest

from train.bit_allocation import Option, allocate_bits


def layers(rng: np.random.Generator, count: int) -> dict[str, list[Option]]:
    """Return options whose cost grows with the bits; the loss increase falls with them from a value of its own in each layer."""
    sizes, increases = rng.integers(1, 20, count), rng.uniform(0.1, 10, count)
    return {
        f"l{i}": [Option(bits, float(sizes[i] * bits), float(increases[i] * 4.0**-bits)) for bits in (2, 3, 4, 6, 8)] for i in range(count)
    }


def totals(options: dict[str, list[Option]], chosen: dict[str, int]) -> tuple[float, float]:
    picked = [next(option for option in options[name] if option.bits == bits) for name, bits in chosen.items()]
    return sum(option.cost for option in picked), sum(option.loss_increase for option in picked)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_within_the_budget(seed):
    options = layers(np.random.default_rng(seed), 5)
    budget = totals(options, dict.fromkeys(options, 4))[0]
    cost, increase = totals(options, allocate_bits(options, budget))
    assert cost <= budget
    every = (totals(options, dict(zip(options, bits, strict=True))) for bits in itertools.product((2, 3, 4, 6, 8), repeat=5))
    best = min(found for spent, found in every if spent <= budget)
    assert increase == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_with_many_layers_the_choice_is_as_good_as_any(seed):
    options = layers(np.random.default_rng(seed), 100)
    budget = totals(options, dict.fromkeys(options, 4))[0]
    increase = totals(options, allocate_bits(options, budget))[1]
    least = max(
        sum(min(o.loss_increase + price * o.cost for o in choices) for choices in options.values()) - price * budget
        for price in np.geomspace(1e-6, 1, 400)
    )
    assert least <= increase <= 1.01 * least, "no allocation within the budget is better than the dual bound"


def test_sensitive_layers_get_more_bits_at_equal_cost():
    options = {
        name: [Option(bits, float(bits), increase / bits) for bits in (2, 4, 6)]
        for name, increase in (("robust", 0.1), ("middling", 1.0), ("fragile", 10.0))
    }
    assert allocate_bits(options, 12.0) == {"robust": 2, "middling": 4, "fragile": 6}


def test_all_bits_fit_a_large_budget_and_a_budget_below_the_cheapest_is_refused():
    options = layers(np.random.default_rng(0), 3)
    assert set(allocate_bits(options, 1e9).values()) == {8}
    with pytest.raises(ValueError, match="the budget is 1, but the cheapest widths already cost"):
        allocate_bits(options, 1.0)
