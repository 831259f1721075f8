"""Whether servers did equal work: only then may their times be compared.

`client` already refuses single answers of another length. Here what the servers did is compared with each other: the
same prompts, as many tokens in and out by their own counts, the same sampling, the same way to end. A prompt that one
server had in a cache is no equal work either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loadtest.client import UnequalWork
from loadtest.turns import Turn, Work

# of a request body: what decides which tokens come, and how many; a server's own fields may not set them
SAMPLING_FIELDS = frozenset({
    "temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "n", "best_of", "max_tokens",
    "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "prompt", "logit_bias",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "repeat_penalty", "logprobs", "echo", "speculative",
    "use_beam_search",
})  # fmt: skip


def check_extra(server: str, extra: Mapping[str, Any]) -> None:
    """Raise UnequalWork where the fields that only one server gets would change the work."""
    if found := sorted(SAMPLING_FIELDS & extra.keys()):
        raise UnequalWork(f"{server} alone would get {', '.join(found)}: that changes the work")


def check_turns(turns: Iterable[Turn]) -> None:
    """Raise UnequalWork, with the servers and what differs, unless all turns of a level and round are equal work."""
    first: dict[tuple[int, int], Turn] = {}
    for turn in turns:
        if turn.work is None:
            raise UnequalWork(f"of {turn.server} at {turn.streams} it was not noted what it did")
        where = f"at {turn.streams} streams, round {turn.round}"
        for text in _odd(turn.work):
            raise UnequalWork(f"{turn.server} {where}: {text}")
        other = first.setdefault((turn.streams, turn.round), turn)
        assert other.work is not None
        for text in _differences(other.work, turn.work):
            raise UnequalWork(f"{other.server} and {turn.server} {where}: {text}")


def _odd(work: Work) -> Iterable[str]:
    """What is wrong with one alone."""
    if work.cached_tokens:
        yield f"{work.cached_tokens} prompt tokens came from its cache and were not computed: switch prefix caching off"
    if work.counted_tokens is not None and work.counted_tokens != work.new_tokens:
        yield f"/metrics counted {work.counted_tokens} new tokens, its answers say {work.new_tokens}: others use it too"


def _differences(one: Work, two: Work) -> Iterable[str]:
    if one.seeds == two.seeds and one.prompts != two.prompts:
        yield f"different prompts ({one.prompts} and {two.prompts})"
    names = {"requests": "requests", "prompt_tokens": "prompt tokens", "new_tokens": "new tokens"}
    for field, name in names.items():
        if getattr(one, field) != getattr(two, field):
            yield f"{getattr(one, field)} {name} and {getattr(two, field)}"
    if one.sampling != two.sampling:
        yield f"sampling {one.sampling} and {two.sampling}"
    if _reasons(one) != _reasons(two):
        yield f"answers ended by {_reasons(one)} and by {_reasons(two)}"


def _reasons(work: Work) -> list[str]:
    """A server may send none; that is no other way to end."""
    return sorted({reason or "length" for reason in work.finish_reasons})
