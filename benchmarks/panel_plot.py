"""The dashboard's panels as one picture, by matplotlib (the extra `plots`): import this where it is installed.

Not Grafana: places, titles, queries and legends are the dashboard's, colours and text are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.panels import Panel
from benchmarks.prometheus import Series

Named = list[tuple[str, Series]]
WIDTH_IN, UNIT_IN, DPI = 16.0, 0.34, 90
MIB = 2**20
TOP = 2  # units for the title
MAX_LEGEND = 8
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def write_png(answers: Sequence[tuple[Panel, list[Named]]], title: str, path: Path) -> None:
    """Draw panels with the named series of each of their queries. Raises OSError."""
    height = max(panel.place[1] + panel.place[3] for panel, _ in answers) + TOP
    figure = Figure(figsize=(WIDTH_IN, height * UNIT_IN), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.012, 1 - 0.9 / height, title, fontsize=10, va="center")
    moments = [at for _, queries in answers for named in queries for _, s in named for at, _ in s.points] or [0.0]
    span = min(moments), max(moments)
    rows: dict[str, int] = {}
    for panel, queries in answers:
        x, y, width, tall = panel.place
        rows.setdefault(panel.row, y)
        inset = (0.042, 1.5, 1.7) if panel.kind == "timeseries" else (0.012, 1.0, 0.4)  # left, above, below
        axes = figure.add_axes(
            (
                x / 24 + inset[0],
                1 - (y + TOP + tall - inset[2]) / height,
                width / 24 - inset[0] - 0.012,
                (tall - inset[1] - inset[2]) / height,
            )
        )
        axes.set_title(panel.title, fontsize=9, loc="left", fontweight="bold")
        if panel.kind == "timeseries":
            _draw_series(axes, panel, queries, span)
        else:
            _write_text(axes, panel, queries)
    for name, y in rows.items():
        figure.text(0.012, 1 - (y + TOP - 0.55) / height, name, fontsize=11, color="#1f6fd0", va="center")
    figure.savefig(path)


def shown(value: float, unit: str) -> str:
    """A value as Grafana writes its unit."""
    if unit == "bytes":
        power = next((i for i in range(len(BINARY)) if abs(value) < 1024 ** (i + 1)), len(BINARY) - 1)
        return f"{value / 1024**power:.3g} {BINARY[power]}"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if 0 < abs(value) < 1 else f"{value:.3g} s"
    return f"{value:.4g}"


def _draw_series(axes: Axes, panel: Panel, queries: Sequence[Named], span: tuple[float, float]) -> None:
    start, end = span
    scale = MIB if panel.unit == "bytes" else 1  # for round numbers on the axis
    for index, named in enumerate(queries):
        if panel.stacked and index == 0 and named:
            _stack(axes, named, start, scale)
            continue
        for name, series in named:
            times = [at - start for at, _ in series.points]
            style = "--" if panel.stacked else "-"
            values = [value / scale for _, value in series.points]
            axes.plot(times, values, linewidth=1.1, label=name, linestyle=style)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value * scale, panel.unit)))
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(end - start, 1))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="#888888")
        return
    axes.legend(handles[:MAX_LEGEND], labels[:MAX_LEGEND], fontsize=6, frameon=False, ncol=2, loc="upper center",
                bbox_to_anchor=(0.5, -0.1), borderaxespad=0.2)  # fmt: skip


def _stack(axes: Axes, named: Named, start: float, scale: float) -> None:
    """Readings of one moment on each other; a series without one counts 0 there."""
    times = sorted({at for _, series in named for at, _ in series.points})
    readings: list[Mapping[float, float]] = [dict(series.points) for _, series in named]
    heights = [[_number(one.get(at, 0.0)) / scale for at in times] for one in readings]
    axes.stackplot([at - start for at in times], heights, labels=[name for name, _ in named], alpha=0.7)


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _write_text(axes: Axes, panel: Panel, queries: Sequence[Named]) -> None:
    axes.set_axis_off()
    lines = []
    for named in queries:
        for name, series in named:
            value = shown(series.points[-1][1], panel.unit)
            facts = ", ".join(f"{k} {v}" for k, v in sorted(series.labels.items()) if k not in ("__name__", "engine"))
            lines.append(facts if panel.kind == "table" else f"{name}  {value}")
    text = "\n".join(lines) if lines else "no data"
    axes.text(0, 0.95, text, transform=axes.transAxes, fontsize=7, va="top", wrap=True)
