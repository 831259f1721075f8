"""From turns to a verdict: medians and percentiles per server and level, ratios of rounds, and the bars met or missed.

Numbers only; `contest` measures, `rivals` prints and writes. A turn that other processes disturbed is left out, unless
a server has no other at that level, and then it is marked. The choice looks at the CPU others took, never at a result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Turn:
    """One server at one level in one round. Times in seconds."""

    server: str
    streams: int
    round: int
    tokens_per_s: float
    ttft_s: list[float]
    itl_s: list[float]
    cpu_s_per_token: float  # of the server's tree, prompt and all
    others_cores: float  # taken by neither the server nor the client
    noisy: bool
    discarded: int = 0  # noisier attempts before this one


@dataclass(frozen=True, slots=True)
class Memory:
    """What one server took, alone on the machine, from its start to the end of its largest burst."""

    pss_bytes: int  # highest sample of the tree
    rss_bytes: int  # sum of the kernel's peaks of each process
    processes: int
    ready_s: float  # from its start

    @property
    def peak_bytes(self) -> int:
        """Of one process the kernel's peak, exact; of several the sample, as a sum counts shared pages twice."""
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
    cpu_ms_per_token: float
    others_cores: float  # the most of any turn that counts
    turns: int
    noisy: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio ours / theirs that has to be reached, against the best of some rivals."""

    text: str
    metric: str  # of Cell; of Memory where it is no matter of level
    streams: int | None  # None: of memory
    factor: float
    higher_is_better: bool
    allowed: Callable[[str, int], bool]  # which rivals, by name and bits of their weights


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar beside what was measured."""

    bar: str
    rival: str | None
    ours: float | None
    theirs: float | None
    ratio: float | None
    spread: tuple[float, float] | None  # of the ratio over rounds
    verdict: str  # met, missed, or why there is none


def _is_llama_q8(name: str, bits: int) -> bool:
    return name.startswith("llama.cpp-q8_0")  # and variants of it


def _is_8_bit_or_more(name: str, bits: int) -> bool:
    return bits >= 8  # 4-bit weights are another quality; their figures stand in the table and in no bar


def _is_8_or_16_bit(name: str, bits: int) -> bool:
    return bits in (8, 16)


BARS = (
    Bar("1 stream: tokens/s at least 1.2x llama.cpp Q8_0", "tokens_per_s", 1, 1.2, True, _is_llama_q8),
    Bar("8 streams: tokens/s at least 1.5x the best 8- or 16-bit rival", "tokens_per_s", 8, 1.5, True, _is_8_or_16_bit),
    Bar("16 streams: tokens/s at least 1.5x the best 8- or 16-bit rival", "tokens_per_s", 16, 1.5, True,
        _is_8_or_16_bit),
    Bar("8 streams: TTFT p50 at most 0.7x the best rival", "ttft_p50_ms", 8, 0.7, False, _is_8_bit_or_more),
    Bar("16 streams: ITL p95 no worse than the best rival", "itl_p95_ms", 16, 1.0, False, _is_8_bit_or_more),
    Bar("peak memory of the process tree the lowest of all", "peak_bytes", None, 1.0, False, _is_8_bit_or_more),
)  # fmt: skip


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
    return [_cell(server, streams, counted(group)) for (server, streams), group in groups.items()]


def _cell(server: str, streams: int, turns: list[Turn]) -> Cell:
    speeds = [turn.tokens_per_s for turn in turns]
    ttft = [1e3 * t for turn in turns for t in turn.ttft_s]
    itl = [1e3 * t for turn in turns for t in turn.itl_s]
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
        cpu_ms_per_token=1e3 * statistics.median(turn.cpu_s_per_token for turn in turns),
        others_cores=max(turn.others_cores for turn in turns),
        turns=len(turns),
        noisy=any(turn.noisy for turn in turns),
    )


def judge(ours: str, bits: dict[str, int], turns: Sequence[Turn], memory: Mapping[str, Memory]) -> list[Verdict]:
    """Every bar of BARS. `bits` names the servers compared and the width of their weights."""
    return [_judge_one(bar, ours, bits, turns, memory) for bar in BARS]


def _judge_one(
    bar: Bar, ours: str, bits: dict[str, int], turns: Sequence[Turn], memory: Mapping[str, Memory]
) -> Verdict:
    if bar.streams is None:
        values: dict[str, float] = {name: figures.peak_bytes for name, figures in memory.items()}
        noisy = set[str]()
    else:
        cells = [cell for cell in summarize(turns) if cell.streams == bar.streams]
        values = {cell.server: getattr(cell, bar.metric) for cell in cells}
        noisy = {cell.server for cell in cells if cell.noisy}
    rivals = [name for name in values if not name.startswith("ours") and bar.allowed(name, bits[name])]
    if ours not in values or not rivals:
        return Verdict(bar.text, None, values.get(ours), None, None, None, "not measured")
    best = (max if bar.higher_is_better else min)(rivals, key=values.__getitem__)
    ratio = values[ours] / values[best]
    met = ratio >= bar.factor if bar.higher_is_better else ratio <= bar.factor
    word = "met" if met else "missed"
    if {ours, best} & noisy:
        word += " (noisy)"
    spread = None if bar.streams is None else _spread(bar.metric, bar.streams, ours, best, turns)
    return Verdict(bar.text, best, values[ours], values[best], ratio, spread, word)


def _spread(metric: str, streams: int, ours: str, theirs: str, turns: Sequence[Turn]) -> tuple[float, float] | None:
    """Lowest and highest ratio of the rounds that count for both."""
    ratios = ratios_of_rounds(metric, streams, ours, theirs, turns)
    return (min(ratios), max(ratios)) if ratios else None


def ratios_of_rounds(metric: str, streams: int, ours: str, theirs: str, turns: Sequence[Turn]) -> list[float]:
    """ours / theirs in each round that counts for both."""
    values: dict[str, dict[int, float]] = {}
    for name in (ours, theirs):
        chosen = counted(turn for turn in turns if turn.server == name and turn.streams == streams)
        values[name] = {turn.round: getattr(_cell(name, streams, [turn]), metric) for turn in chosen}
    rounds = sorted(values[ours].keys() & values[theirs].keys())
    return [values[ours][r] / values[theirs][r] for r in rounds]


def markdown(cells: Sequence[Cell], memory: Mapping[str, Memory], verdicts: Sequence[Verdict], ours: str) -> str:
    """Three tables: figures by level, memory, bars."""
    mib = 2**20
    lines = [
        "| server | streams | tokens/s | ours / it | TTFT p50 / p95 ms | ITL p50 / p95 ms | CPU ms/token | others |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    speed = {cell.streams: cell.tokens_per_s for cell in cells if cell.server == ours}
    for c in sorted(cells, key=lambda cell: cell.streams):
        ratio = f"{speed[c.streams] / c.tokens_per_s:.2f}" if c.streams in speed and c.server != ours else ""
        lines.append(
            f"| {c.server} | {c.streams} | {c.tokens_per_s:.1f} [{c.tokens_per_s_min:.1f}..{c.tokens_per_s_max:.1f}]"
            f" | {ratio} | {c.ttft_p50_ms:.0f} / {c.ttft_p95_ms:.0f} | {c.itl_p50_ms:.1f} / {c.itl_p95_ms:.1f}"
            f" | {c.cpu_ms_per_token:.1f} | {c.others_cores:.2f}{' noisy' if c.noisy else ''} |"
        )
    lines += [
        "",
        "| server | peak memory MiB | sampled PSS | sum of peak RSS | processes | ready after s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, m in memory.items():
        lines.append(
            f"| {name} | {m.peak_bytes / mib:.0f} | {m.pss_bytes / mib:.0f} | {m.rss_bytes / mib:.0f}"
            f" | {m.processes} | {m.ready_s:.1f} |"
        )
    lines += ["", "| bar | best rival | ratio ours / theirs | verdict |", "|---|---|---:|---|"]
    for v in verdicts:
        spread = f" [{v.spread[0]:.2f}..{v.spread[1]:.2f}]" if v.spread else ""
        ratio = "" if v.ratio is None else f"{v.ratio:.2f}{spread}"
        lines.append(f"| {v.bar} | {v.rival or ''} | {ratio} | {v.verdict} |")
    return "\n".join(lines)


def compact(turn: Turn) -> dict[str, Any]:
    """A turn for the JSON file: percentiles instead of every gap."""
    kept = {k: v for k, v in asdict(turn).items() if k not in ("ttft_s", "itl_s")}
    cell = asdict(_cell(turn.server, turn.streams, [turn]))
    return kept | {k: cell[k] for k in ("ttft_p50_ms", "ttft_p95_ms", "itl_p50_ms", "itl_p95_ms")}
