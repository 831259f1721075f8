from __future__ import annotations

import math

import pytest
import torch

from spq.prune import kept_neurons, kept_width, prune_ratios


def test_ratios_by_hand() -> None:
    means = [1.0, math.e, math.e**2]
    low, middle, high = prune_ratios(means, 0.01, 0.05)
    assert low == pytest.approx(0.05, abs=1e-6)  # smallest activation: the maximum
    assert middle == pytest.approx(0.03, abs=1e-6)  # logarithmic: half way
    assert high == pytest.approx(0.01, abs=1e-9)


def test_equal_layers_lose_the_minimum() -> None:
    assert prune_ratios([0.5, 0.5], 0.0, 0.3) == [0.0, 0.0]


def test_dead_layer_does_not_break_the_logarithm() -> None:
    assert prune_ratios([0.0, 1.0], 0.0, 0.2) == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize(
    ("width", "ratio", "multiple", "kept"),
    [
        (11008, 0.05, 1, 10457),  # int(), not rounded: the published example
        (11008, 0.05, None, 10496),  # next multiple of 64
        (512, 0.05, None, 496),
        (172, 0.0, None, 172),  # no multiple of 8, never above the width
        (10, 0.99, 1, 1),
    ],
)
def test_kept_width(width: int, ratio: float, multiple: int | None, kept: int) -> None:
    assert kept_width(width, ratio, multiple) == kept


def test_kept_neurons_are_the_largest_in_order() -> None:
    assert kept_neurons(torch.tensor([0.1, 5.0, 0.2, 4.0, 3.0]), 3).tolist() == [1, 3, 4]
