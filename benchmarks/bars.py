"""The project's bars on a CPU, judged: which ratio to which rival has to be reached, and whether it was.

Numbers and tables only; `rivals` measures. `loadtest.verdict` compares without bars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loadtest.turns import Cell, Memory, Turn, ratios_of_rounds, summarize


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
            f" | {_number(c.cpu_ms_per_token, 1)} | {_number(c.others_cores, 2)}{' noisy' if c.noisy else ''} |"
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


def _number(value: float | None, digits: int) -> str:
    return "not known" if value is None else f"{value:.{digits}f}"
