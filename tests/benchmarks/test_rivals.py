"""Which bars are met, and against whom."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import bars
from benchmarks.bars import judge
from loadtest.turns import Memory, Turn, summarize


def turn(server: str, streams: int, round_: int, speed: float, *, noisy: bool = False, **more: Any) -> Turn:
    values = {"ttft_s": [0.1], "itl_s": [0.01, 0.02], "cpu_s_per_token": 0.01} | more
    return Turn(server, streams, round_, speed, others_cores=0.9 if noisy else 0.0, noisy=noisy, **values)


BITS = {"ours": 8, "ours-none": 32, "llama.cpp-q8_0": 8, "llama.cpp-q4_0": 4, "vllm-bfloat16": 16}
MEMORY = {
    "ours": Memory(200, 290, 1, 1.0),
    "llama.cpp-q8_0": Memory(290, 300, 1, 1.0),
    "vllm-bfloat16": Memory(900, 990, 4, 1.0),
}


def test_bars_are_judged_against_the_best_rival_that_counts() -> None:
    speeds = {
        "ours": 150.0,
        "ours-none": 400.0,
        "llama.cpp-q8_0": 90.0,
        "llama.cpp-q4_0": 300.0,
        "vllm-bfloat16": 100.0,
    }
    turns = [turn(name, 8, r, speed * (1 + r / 100)) for name, speed in speeds.items() for r in (1, 2)]
    verdict = next(v for v in judge("ours", BITS, turns, MEMORY) if v.bar.startswith("8 streams: tokens/s"))
    assert verdict.rival == "vllm-bfloat16", "4-bit weights and our own variants are not the rivals of this bar"
    assert verdict.ratio == pytest.approx(1.5)
    assert verdict.spread == pytest.approx((1.5, 1.5))
    assert verdict.verdict == "met"
    slower = [turn(t.server, 8, t.round, t.tokens_per_s * (0.99 if t.server == "ours" else 1)) for t in turns]
    verdict = next(v for v in judge("ours", BITS, slower, MEMORY) if v.bar.startswith("8 streams: tokens/s"))
    assert verdict.verdict == "missed"


@pytest.mark.parametrize(("ours_ms", "word"), [(69.0, "met"), (71.0, "missed")])
def test_where_lower_is_better_the_lowest_rival_counts(ours_ms: float, word: str) -> None:
    times = {"ours": ours_ms, "llama.cpp-q8_0": 200.0, "vllm-bfloat16": 100.0, "llama.cpp-q4_0": 20.0}
    turns = [turn(name, 8, 1, 1.0, ttft_s=[ms / 1e3]) for name, ms in times.items()]
    verdict = next(v for v in judge("ours", BITS, turns, MEMORY) if "TTFT" in v.bar)
    assert (verdict.rival, verdict.verdict) == ("vllm-bfloat16", word)


def test_memory_is_judged_without_a_level() -> None:
    verdict = next(v for v in judge("ours", BITS, [], MEMORY) if "memory" in v.bar)
    assert (verdict.rival, verdict.verdict, verdict.spread) == ("llama.cpp-q8_0", "met", None)
    assert (verdict.ours, verdict.theirs) == (290, 300), "of one process the kernel's peak counts"
    assert MEMORY["vllm-bfloat16"].peak_bytes == 900, "of several it would count shared pages twice"


def test_what_was_not_measured_is_not_called_met() -> None:
    turns = [turn("ours", 1, 1, 10.0), turn("llama.cpp-q4_0", 1, 1, 1.0)]
    verdict = next(v for v in judge("ours", BITS, turns, MEMORY) if v.bar.startswith("1 stream"))
    assert (verdict.rival, verdict.ratio, verdict.verdict) == (None, None, "not measured")


def test_a_noisy_side_is_said_in_the_verdict() -> None:
    turns = [turn("ours", 1, 1, 10.0, noisy=True), turn("llama.cpp-q8_0", 1, 1, 1.0)]
    verdict = next(v for v in judge("ours", BITS, turns, MEMORY) if v.bar.startswith("1 stream"))
    assert verdict.verdict == "met (noisy)"


def test_the_table_names_every_server_and_bar() -> None:
    turns = [turn(name, level, 1, 10.0) for name in ("ours", "llama.cpp-q8_0") for level in (1, 8, 16)]
    verdicts = judge("ours", BITS, turns, MEMORY)
    text = bars.markdown(summarize(turns), MEMORY, verdicts, "ours")
    assert all(verdict.bar in text for verdict in verdicts)
    assert text.count("| llama.cpp-q8_0 | 8 |") == 1
