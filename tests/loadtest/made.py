"""Turns as if they had been measured, and results of two servers."""

from __future__ import annotations

from typing import Any

from loadtest.report import Results
from loadtest.turns import Memory, Turn, Work


def work(**changes: Any) -> Work:
    plain: dict[str, Any] = {
        "seeds": [1], "prompts": "abc", "sampling": {"temperature": 0}, "requests": 1, "prompt_tokens": 8,
        "new_tokens": 4, "finish_reasons": ["length"],
    }  # fmt: skip
    return Work(**plain | changes)


def turn(server: str, streams: int, round_: int, speed: float, *, noisy: bool = False, **more: Any) -> Turn:
    values = {
        "ttft_s": [0.1],
        "itl_s": [0.01, 0.02],
        "cpu_s_per_token": 0.01,
        "work": work(),
        "arrivals": [1, 2],
    } | more
    return Turn(server, streams, round_, speed, others_cores=0.9 if noisy else 0.0, noisy=noisy, **values)


MIB = 1 << 20


def results() -> Results:
    """`a` is faster at 1 and at 8, takes more memory, and their latency is the same."""
    turns = [turn("a", n, r, 20.0 + r) for n in (1, 8) for r in (1, 2)]
    turns += [turn("b", n, r, 10.0 + r) for n in (1, 8) for r in (1, 2)]
    memory = {
        "a": Memory(
            300 * MIB, 300 * MIB, 1, 1.0, kinds={"data": 200 * MIB, "files": 100 * MIB}, ledger={"kv": 5 * MIB}
        ),
        "b": Memory(200 * MIB, 200 * MIB, 1, 1.0, kinds={"data": 200 * MIB, "files": 0}),
    }
    facts = {"cpu": "one <of> many", "load": {"levels": "1,8"}, "servers": {"a": "x | y"}}
    return Results("a", facts, {"a": 8, "b": 4}, turns, memory)
