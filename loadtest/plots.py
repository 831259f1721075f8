"""The pictures of a report, as PNG. The one module that draws; nothing is shown on a screen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.turns import BIN_S, Cell, Memory, Turn

MIB = 1 << 20
WIDTH, HEIGHT = 9.0, 5.0  # inches


def throughput_latency(cells: Sequence[Cell]) -> bytes:
    """Tokens/s across, time per token up; a line per server, a point per number of streams."""
    figure, axes = _axes()
    for server in dict.fromkeys(cell.server for cell in cells):
        own = sorted((cell for cell in cells if cell.server == server), key=lambda cell: cell.streams)
        x, y = [cell.tokens_per_s for cell in own], [cell.itl_mean_ms for cell in own]
        axes.plot(x, y, marker="o", label=server)
        for cell, across, up in zip(own, x, y, strict=True):
            axes.annotate(str(cell.streams), (across, up), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xlabel="tokens/s of all streams, prompts included", ylabel="mean time between tokens of a stream, ms")
    axes.set_title("Throughput against latency, by streams at once")
    axes.legend()
    return _png(figure)


def memory(figures: Mapping[str, Memory]) -> bytes:
    """A bar per server, stacked by kind of page; another for the ledger of a server that keeps one."""
    bars: dict[str, dict[str, int]] = {}
    for name, m in figures.items():
        if m.device_bytes is not None:
            bars[f"{name}, GPU"] = {"device": m.device_bytes}
        elif m.kinds:
            bars[f"{name}, pages"] = m.kinds
        if m.ledger:
            bars[f"{name}, own ledger"] = m.ledger
    figure, axes = _axes(0.6 * len(bars) + 2)
    kinds = list(dict.fromkeys(kind for stack in bars.values() for kind, value in stack.items() if value))
    for index, kind in enumerate(kinds):
        values = [stack.get(kind, 0) / MIB for stack in bars.values()]
        left = [sum(stack.get(other, 0) for other in kinds[:index]) / MIB for stack in bars.values()]
        axes.barh(list(bars), values, left=left, label=kind, color=colormaps["tab20"](index % 20))
    axes.invert_yaxis()
    axes.set(xlabel="MiB")
    axes.set_title("Memory by kind, after the largest burst")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def tokens_over_time(turns: Sequence[Turn]) -> bytes:
    """Tokens/s through the turn of most streams in the last round, each server from its own beginning."""
    figure, axes = _axes()
    level = max(turn.streams for turn in turns)
    last = {turn.server: turn for turn in sorted(turns, key=lambda turn: turn.round) if turn.streams == level}
    for server, turn in last.items():
        axes.step([BIN_S * i for i in range(len(turn.arrivals))], [n / BIN_S for n in turn.arrivals],
                  where="post", label=server)  # fmt: skip
    axes.set(xlabel="seconds since the requests were sent", ylabel="tokens/s received")
    axes.set_title(f"Tokens/s over time, {level} streams")
    axes.legend()
    return _png(figure)


def _axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})  # else an address is in the file
    return buffer.getvalue()
