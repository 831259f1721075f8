"""Medians and percentiles of turns, and which turns count."""

from __future__ import annotations

import pytest
from made import turn

from loadtest.turns import percentile, summarize


def test_percentiles_are_by_nearest_rank() -> None:
    assert [percentile(range(100), share) for share in (0.0, 0.5, 0.95, 1.0)] == [0, 50, 95, 99]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_noisy_turns_count_only_where_there_is_no_other() -> None:
    mixed = [turn("a", 1, 1, 10.0), turn("a", 1, 2, 2.0, noisy=True), turn("a", 1, 3, 12.0)]
    (cell,) = summarize(mixed)
    assert (cell.tokens_per_s, cell.turns, cell.noisy) == (11.0, 2, False)
    (cell,) = summarize(mixed[1:2])
    assert (cell.tokens_per_s, cell.turns, cell.noisy) == (2.0, 1, True)
