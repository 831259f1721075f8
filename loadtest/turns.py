"""What was measured, as plain numbers: turns, memory, and medians and percentiles of them per server and level.

`contest` measures, `verdict` and `report` say what it means. A turn that other processes disturbed is left out, unless
a server has no other at that level, and then it is marked. The choice looks at the CPU others took, never at a result.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Work:
    """What was asked and what came, for `equal` to compare. Tokens are the server's own count."""

    seeds: list[int]
    prompts: str  # hash of all prompts in order
    sampling: dict[str, Any]
    requests: int
    prompt_tokens: int
    new_tokens: int
    finish_reasons: list[str | None]  # each that came, once
    cached_tokens: int | None = None  # prompt tokens found in a cache, where /metrics says so
    counted_tokens: int | None = None  # generated, by /metrics


@dataclass(slots=True)
class Turn:
    """One server at one level in one round. Times in seconds."""

    server: str
    streams: int
    round: int
    tokens_per_s: float
    ttft_s: list[float]
    itl_s: list[float]
    cpu_s_per_token: float | None  # of the server's tree, prompt and all; None: it is not ours to watch
    others_cores: float | None  # taken by neither the server nor the client
    noisy: bool
    discarded: int = 0  # noisier attempts before this one
    work: Work | None = None
    arrivals: list[int] = field(default_factory=list)  # chunks in each BIN_S of the turn


BIN_S = 0.25


@dataclass(frozen=True, slots=True)
class Memory:
    """What one server took, alone on the machine, from its start to the end of its largest burst."""

    pss_bytes: int  # highest sample of the tree
    rss_bytes: int  # sum of the kernel's peaks of each process
    processes: int
    ready_s: float  # from its start
    device_bytes: int | None = None  # of the GPU, above what was in use before it started
    kinds: dict[str, int] = field(default_factory=dict)  # of the process tree at the end: data, files, shared
    ledger: dict[str, int] = field(default_factory=dict)  # as the server itself counts, where it does

    @property
    def peak_bytes(self) -> int:
        """On a GPU what it took of that. Else of one process the kernel's peak, exact; of several the sample, as a sum
        counts shared pages twice. A server that runs elsewhere has none: 0."""
        if self.device_bytes is not None:
            return self.device_bytes
        return self.rss_bytes if self.processes == 1 else self.pss_bytes


@dataclass(slots=True)
class Cell:
    """All turns of one server at one level."""

    server: str
    streams: int
    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    itl_p50_ms: float
    itl_p95_ms: float
    itl_mean_ms: float
    cpu_ms_per_token: float | None
    others_cores: float | None  # the most of any turn that counts
    turns: int
    noisy: bool


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; `share` in 0..1. Raises ValueError where there is no value."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def counted(turns: Iterable[Turn]) -> list[Turn]:
    """The quiet turns, or all where none was quiet."""
    turns = list(turns)
    return [turn for turn in turns if not turn.noisy] or turns


def summarize(turns: Iterable[Turn]) -> list[Cell]:
    """One cell per server and level, in order of appearance."""
    groups: dict[tuple[str, int], list[Turn]] = {}
    for turn in turns:
        groups.setdefault((turn.server, turn.streams), []).append(turn)
    return [cell_of(server, streams, counted(group)) for (server, streams), group in groups.items()]


def cell_of(server: str, streams: int, turns: list[Turn]) -> Cell:
    """All of these together: medians over turns, percentiles over what all their answers saw."""
    speeds = [turn.tokens_per_s for turn in turns]
    ttft = [1e3 * t for turn in turns for t in turn.ttft_s]
    itl = [1e3 * t for turn in turns for t in turn.itl_s]
    cpu = [turn.cpu_s_per_token for turn in turns if turn.cpu_s_per_token is not None]
    others = [turn.others_cores for turn in turns if turn.others_cores is not None]
    return Cell(
        server=server,
        streams=streams,
        tokens_per_s=statistics.median(speeds),
        tokens_per_s_min=min(speeds),
        tokens_per_s_max=max(speeds),
        ttft_p50_ms=percentile(ttft, 0.5),
        ttft_p95_ms=percentile(ttft, 0.95),
        itl_p50_ms=percentile(itl, 0.5),
        itl_p95_ms=percentile(itl, 0.95),
        itl_mean_ms=statistics.fmean(itl),
        cpu_ms_per_token=1e3 * statistics.median(cpu) if cpu else None,
        others_cores=max(others, default=None),
        turns=len(turns),
        noisy=any(turn.noisy for turn in turns),
    )


def ratios_of_rounds(metric: str, streams: int, ours: str, theirs: str, turns: Sequence[Turn]) -> list[float]:
    """ours / theirs in each round that counts for both."""
    values: dict[str, dict[int, float]] = {}
    for name in (ours, theirs):
        chosen = counted(turn for turn in turns if turn.server == name and turn.streams == streams)
        values[name] = {turn.round: getattr(cell_of(name, streams, [turn]), metric) for turn in chosen}
    rounds = sorted(values[ours].keys() & values[theirs].keys())
    return [values[ours][r] / values[theirs][r] for r in rounds]


def compact(turn: Turn) -> dict[str, Any]:
    """A turn for a JSON file that people read: percentiles instead of every gap."""
    kept = {k: v for k, v in asdict(turn).items() if k not in ("ttft_s", "itl_s", "arrivals")}
    cell = asdict(cell_of(turn.server, turn.streams, [turn]))
    return kept | {k: cell[k] for k in ("ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms")}
