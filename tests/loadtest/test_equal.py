"""Unequal work is refused, and the refusal says what differs."""

from __future__ import annotations

from typing import Any

import pytest
from made import turn, work

from loadtest.client import UnequalWork
from loadtest.equal import check_extra, check_turns


def pair(**changes: Any) -> list[Any]:
    return [turn("a", 1, 1, 1.0, work=work()), turn("b", 1, 1, 1.0, work=work(**changes))]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompts": "other"}, "a and b at 1 streams, round 1: different prompts"),
        ({"prompt_tokens": 9}, "8 prompt tokens and 9"),
        ({"new_tokens": 5}, "4 new tokens and 5"),
        ({"requests": 2}, "1 requests and 2"),
        ({"sampling": {"temperature": 1}}, "sampling"),
        ({"finish_reasons": ["length", "stop"]}, r"ended by \['length'\] and by \['length', 'stop'\]"),
        ({"cached_tokens": 3}, "b at 1 streams, round 1: 3 prompt tokens came from its cache"),
        ({"counted_tokens": 40}, "/metrics counted 40 new tokens, its answers say 4"),
    ],
)
def test_a_difference_is_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnequalWork, match=complaint):
        check_turns(pair(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"finish_reasons": [None]},
        {"seeds": [2], "prompts": "another attempt"},
        {"cached_tokens": 0, "counted_tokens": 4},
    ],
    ids=["same", "no reason sent", "tried again with other prompts of the same size", "metrics agree"],
)
def test_equal_work_passes(changes: dict[str, Any]) -> None:
    check_turns(pair(**changes))


def test_turns_of_other_rounds_and_levels_are_not_compared() -> None:
    check_turns([turn("a", 1, 1, 1.0, work=work()), turn("b", 1, 2, 1.0, work=work(prompts="x")),
                 turn("b", 2, 1, 1.0, work=work(requests=2))])  # fmt: skip


def test_one_server_may_not_get_sampling_of_its_own() -> None:
    check_extra("a", {"ignore_eos": True, "cache_prompt": False, "model": "m"})
    with pytest.raises(UnequalWork, match="a alone would get temperature, top_k"):
        check_extra("a", {"top_k": 1, "temperature": 0.5})
