"""Choosing one option for every part of a model so that the predicted loss is least and the bytes fit: a knapsack.

Not where options come from (`survey`). The multiple-choice knapsack is solved by Lagrangian relaxation (Everett 1963):
for a price per byte every part takes the option with the least loss + price * bytes; the price is found by bisection.
What bytes are left over buys single steps, best first. The result is optimal for the bytes it takes, except for those
last steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spq.recipe import Recipe

BISECTIONS = 100


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a part: its bytes, the rise of the loss it is expected to cost (nats), and what to do."""

    nbytes: int
    loss: float
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    width: tuple[int, int] | None = None  # (layer, kept neurons), of an MLP


def choose(parts: Sequence[Sequence[Option]], budget: int) -> list[Option] | None:
    """An option for each part, with at most `budget` bytes in all; None where even the smallest do not fit.

    Options of a part may be in any order; those that another one beats in both respects are never chosen.
    """
    fronts = [pareto(options) for options in parts]
    best = [front[-1] for front in fronts]
    if total_bytes(best) <= budget:
        return best
    smallest = [front[0] for front in fronts]
    if total_bytes(smallest) > budget:
        return None
    low, high = 0.0, _highest_price(fronts)
    chosen = smallest
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5 if low > 0 else high / 2
        tried = [min(front, key=lambda option: option.loss + price * option.nbytes) for front in fronts]
        if total_bytes(tried) <= budget:
            high, chosen = price, tried
        else:
            low = price
        if low > 0 and high / low < 1 + 1e-9:
            break
    return _spend(fronts, chosen, budget - total_bytes(chosen))


def pareto(options: Sequence[Option]) -> list[Option]:
    """The options that no other one beats, by rising bytes and falling loss."""
    front: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if not front or option.loss < front[-1].loss:
            front.append(option)
    return front


def total_bytes(options: Sequence[Option]) -> int:
    """Bytes of a choice."""
    return sum(option.nbytes for option in options)


def total_loss(options: Sequence[Option]) -> float:
    """Predicted rise of the loss of a choice, nats per token."""
    return sum(option.loss for option in options)


def _highest_price(fronts: Sequence[Sequence[Option]]) -> float:
    """A price per byte at which every part takes its smallest option."""
    steps = [
        (front[0].loss - option.loss) / (option.nbytes - front[0].nbytes) for front in fronts for option in front[1:]
    ]
    return 2 * max(steps, default=1.0)


def _spend(fronts: Sequence[Sequence[Option]], chosen: Sequence[Option], left: int) -> list[Option]:
    """Use up what is left: while some part can be improved within it, improve where a byte gains most."""
    result = list(chosen)
    while True:
        gains = [
            ((result[i].loss - option.loss) / (option.nbytes - result[i].nbytes), i, option)
            for i, front in enumerate(fronts)
            for option in front
            if 0 < option.nbytes - result[i].nbytes <= left and option.loss < result[i].loss
        ]
        if not gains:
            return result
        _, i, option = max(gains, key=lambda gain: gain[:2])
        left -= option.nbytes - result[i].nbytes
        result[i] = option
