"""The verdict follows from the figures, whichever server is the subject."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from made import results, turn

from loadtest.turns import Memory, Turn
from loadtest.verdict import BETTER, OPEN, WORSE, Row, count, rows, sentence

MIRROR = {BETTER: WORSE, WORSE: BETTER, OPEN: OPEN}


def words(found: Sequence[Row]) -> dict[tuple[str, int | None], str]:
    return {(row.figure, row.streams): row.word for row in found}


def test_both_ways_say_the_same() -> None:
    made = results()
    one, other = (rows(*names, made.turns, made.memory) for names in (("a", "b"), ("b", "a")))
    assert words(one)["tokens/s", 8] == BETTER
    assert words(one)["memory", None] == WORSE
    assert words(one)["time to first token", 1] == OPEN, "all rounds are equal"
    assert {key: MIRROR[word] for key, word in words(one).items()} == words(other)
    assert [row.ratio for row in one] == pytest.approx([1 / row.ratio for row in other])
    forwards, backwards = sentence("a", "b", one, {"a": 8, "b": 8}), sentence("b", "a", other, {"a": 8, "b": 8})
    assert "better in tokens/s (at 1 1.87 [1.83..1.91]" in forwards and "worse in memory (1.50)" in forwards
    assert "worse in tokens/s (at 1 0.53" in backwards and "better in memory (0.67)" in backwards
    assert count(one) == "2 better, 1 worse, 4 without a clear difference"


def speeds(a: Sequence[float], b: Sequence[float]) -> list[Turn]:
    pairs = zip(a, b, strict=True)
    return [turn(name, 1, r, v) for r, both in enumerate(pairs, start=1) for name, v in zip("ab", both, strict=True)]


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [([12, 12], [10, 10], BETTER), ([12, 9], [10, 10], OPEN), ([9, 8], [10, 10], WORSE), ([20], [10], OPEN)],
    ids=["all rounds", "one round against", "all rounds against", "one round is not enough"],
)
def test_a_word_needs_every_round(a: list[float], b: list[float], word: str) -> None:
    assert words(rows("a", "b", speeds(a, b), {}))["tokens/s", 1] == word


def test_less_is_better_of_latency() -> None:
    turns = [turn(n, 1, r, 1.0, ttft_s=[t]) for r in (1, 2) for n, t in (("a", 0.1), ("b", 0.2))]
    assert words(rows("a", "b", turns, {}))["time to first token", 1] == BETTER


@pytest.mark.parametrize(("ours", "word"), [(1010, OPEN), (1030, WORSE), (970, BETTER)])
def test_memory_within_two_percent_is_no_difference(ours: int, word: str) -> None:
    memory = {name: Memory(size, size, 1, 1.0) for name, size in (("a", ours), ("b", 1000))}
    assert [row.word for row in rows("a", "b", [], memory)] == [word]


def test_unknown_memory_is_in_no_row() -> None:
    assert rows("a", "b", [], {"a": Memory(5, 5, 1, 1.0), "b": Memory(0, 0, 0, 0.0)}) == []


def test_other_bits_are_said_to_be_another_quality() -> None:
    assert "not the same quality" in sentence("a", "b", [], {"a": 8, "b": 4})
    assert "not the same quality" not in sentence("a", "b", [], {"a": 8, "b": 0})
