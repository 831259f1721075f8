"""Who is better in what, and by how much: computed from the turns, the same way whichever server is the subject.

A row is one figure at one level. Better or worse is said only where every round says so and there are two at least;
else the row is open. Memory is one figure a server and no matter of rounds; there 2 % count as no difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.turns import Memory, Turn, ratios_of_rounds, summarize

FIGURES = (  # field of Cell, words, whether more is better
    ("tokens_per_s", "tokens/s", True),
    ("ttft_p50_ms", "time to first token", False),
    ("itl_p95_ms", "p95 inter-token latency", False),
)
MEMORY = "memory"
MEMORY_SLACK = 0.02
BETTER, WORSE, OPEN = "better", "worse", "open"
LEAST_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of the subject over that of the rival; `spread` is the lowest and highest round."""

    figure: str
    streams: int | None  # None: of memory
    ratio: float
    spread: tuple[float, float] | None
    word: str

    def with_spread(self) -> str:
        """The ratio, lowest and highest round in brackets."""
        spread = "" if self.spread is None else f" [{self.spread[0]:.2f}..{self.spread[1]:.2f}]"
        return f"{self.ratio:.2f}{spread}"

    def __str__(self) -> str:
        return self.with_spread() if self.streams is None else f"at {self.streams} {self.with_spread()}"


def rows(subject: str, rival: str, turns: Sequence[Turn], memory: Mapping[str, Memory]) -> list[Row]:
    """Every figure that both have, by figure, then level."""
    found = []
    cells = {(cell.server, cell.streams): cell for cell in summarize(turns)}
    levels = sorted({turn.streams for turn in turns})
    for field, name, more_is_better in FIGURES:
        for streams in levels:
            ours, theirs = cells.get((subject, streams)), cells.get((rival, streams))
            if ours is None or theirs is None:
                continue
            ratio = getattr(ours, field) / getattr(theirs, field)
            each = ratios_of_rounds(field, streams, subject, rival, turns)
            spread = (min(each), max(each)) if each else None
            found.append(Row(name, streams, ratio, spread, _word(each, more_is_better)))
    taken = [memory[name].peak_bytes for name in (subject, rival) if name in memory]
    if len(taken) == 2 and all(taken):
        ratio = taken[0] / taken[1]
        within = 1 / (1 + MEMORY_SLACK) <= ratio <= 1 + MEMORY_SLACK
        found.append(Row(MEMORY, None, ratio, None, OPEN if within else BETTER if ratio < 1 else WORSE))
    return found


def _word(ratios: Sequence[float], more_is_better: bool) -> str:
    if len(ratios) < LEAST_ROUNDS:
        return OPEN
    if min(ratios) > 1:
        return BETTER if more_is_better else WORSE
    if max(ratios) < 1:
        return WORSE if more_is_better else BETTER
    return OPEN


def sentence(subject: str, rival: str, found: Sequence[Row], bits: Mapping[str, int]) -> str:
    """What `rows` found of two servers, in words: where the subject is better, where worse, where neither."""
    parts = []
    for word, phrase in ((BETTER, "better in"), (WORSE, "worse in"), (OPEN, "no clear difference in")):
        if group := [row for row in found if row.word == word]:
            parts.append(f"{phrase} {_listed(group)}")
    text = f"{subject} beside {rival}: " + ("; ".join(parts) or "nothing that both have was measured") + "."
    ours, theirs = bits.get(subject, 0), bits.get(rival, 0)
    if ours and theirs and ours != theirs:
        text += f" (Weights of {ours} and {theirs} bits: this is not the same quality.)"
    return text


def _listed(group: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row.figure for row in group))
    return ", ".join(f"{name} ({', '.join(str(row) for row in group if row.figure == name)})" for name in names)


def count(found: Sequence[Row]) -> str:
    """The rows in one line."""
    words = [row.word for row in found]
    return f"{words.count(BETTER)} better, {words.count(WORSE)} worse, {words.count(OPEN)} without a clear difference"
