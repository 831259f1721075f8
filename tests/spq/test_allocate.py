from __future__ import annotations

import random
from itertools import pairwise, product

import pytest

from spq.allocate import Option, choose, pareto, total_bytes, total_loss


def random_parts(rng: random.Random, parts: int, options: int) -> list[list[Option]]:
    return [[Option(rng.randrange(1, 100), rng.random()) for _ in range(options)] for _ in range(parts)]


@pytest.mark.parametrize("seed", range(30))
def test_choice_is_near_the_best_there_is(seed: int) -> None:
    rng = random.Random(seed)
    parts = random_parts(rng, 5, 5)
    budget = rng.randrange(50, 400)
    feasible = [pick for pick in product(*parts) if total_bytes(pick) <= budget]
    chosen = choose(parts, budget)
    if not feasible:
        assert chosen is None
        return
    assert chosen is not None and total_bytes(chosen) <= budget
    best = min(map(total_loss, feasible))
    # Lagrangian relaxation loses at most one part's step: no choice misses the best by more than the largest step
    steps = [
        max(option.loss for option in front) - min(option.loss for option in front) for front in map(pareto, parts)
    ]
    assert total_loss(chosen) <= best + max(steps)


def test_more_bytes_never_cost_loss() -> None:
    parts = random_parts(random.Random(1), 20, 8)
    losses = [total_loss(chosen) for budget in range(200, 2200, 25) if (chosen := choose(parts, budget)) is not None]
    assert len(losses) > 50
    assert all(later <= earlier + 0.02 for earlier, later in pairwise(losses))


def test_plenty_takes_the_best_and_too_little_nothing() -> None:
    parts = random_parts(random.Random(2), 4, 6)
    plenty = choose(parts, 10_000)
    assert plenty is not None
    assert total_loss(plenty) == pytest.approx(sum(min(o.loss for o in part) for part in parts))
    assert choose(parts, sum(min(o.nbytes for o in part) for part in parts) - 1) is None


def test_front_has_what_no_other_beats() -> None:
    options = [Option(3, 0.5), Option(1, 0.9), Option(3, 0.4), Option(5, 0.4), Option(2, 0.95), Option(7, 0.1)]
    assert [(o.nbytes, o.loss) for o in pareto(options)] == [(1, 0.9), (3, 0.4), (7, 0.1)]


def test_free_options_are_taken() -> None:
    assert choose([[Option(4, 0.0), Option(9, 0.0)]], 9) == [Option(4, 0.0)]
