"""The picture of one view, by matplotlib, which only the extra `plots` installs: import this where it is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from spq.rows import MIB, Row

if TYPE_CHECKING:
    from spq.pareto import View

WIDE_RANGE = 6.0  # a logarithmic axis beyond this ratio
LABEL_WIDTH, LABEL_HEIGHT = 200.0, 26.0  # pixels that a name takes
FRONT, REST = "#1f6fd0", "#9a9a96"


def write_png(rows: Sequence[Row], view: View, title: str, path: Path) -> None:
    """Draw points and front of a view, 1600 x 1000 pixels. Raises OSError."""
    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes, losses = [p.nbytes / MIB for p in view.front], [p.loss for p in view.front]
    limit = max(losses) + 0.75 * max(max(losses) - min(losses), 0.05 * abs(max(losses)))  # as on the page
    rest = [p for p in view.points if not p.on_front and p.loss <= limit]
    far = [p for p in view.points if p.loss > limit]
    axes.scatter([p.nbytes / MIB for p in rest], [p.loss for p in rest], s=22, color=REST, label="another is better")
    if far:
        axes.scatter(
            [p.nbytes / MIB for p in far], [limit] * len(far), s=30, marker="^", color=REST, label="off the scale"
        )
    axes.step(sizes, losses, where="post", color=FRONT, linewidth=1.2, alpha=0.6)
    axes.scatter(sizes, losses, s=36, color=FRONT, zorder=3, label="front")
    for values, axis in (([p.nbytes for p in view.points], "x"), ([min(p.loss, limit) for p in view.points], "y")):
        if min(values) > 0 and max(values) / min(values) > WIDE_RANGE:
            (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
            (axes.xaxis if axis == "x" else axes.yaxis).set_major_formatter(ScalarFormatter())
            (axes.xaxis if axis == "x" else axes.yaxis).set_minor_formatter(NullFormatter())
    axes.set(xlabel="weight files, MiB", ylabel=f"{view.loss}, {view.text}", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    _label(rows, view, axes)
    figure.savefig(path)


def _label(rows: Sequence[Row], view: View, axes: Axes) -> None:
    """Names of the points on the front, where they do not run into the one before."""
    axes.figure.canvas.draw()  # fixes the layout, so that places in pixels are known
    taken: list[tuple[float, float]] = []
    for point in view.front:
        x, y = axes.transData.transform((point.nbytes / MIB, point.loss))
        if any(abs(x - other_x) < LABEL_WIDTH and abs(y - other_y) < LABEL_HEIGHT for other_x, other_y in taken):
            continue
        taken.append((x, y))
        axes.annotate(
            rows[point.row].name.rpartition("/")[2],
            (point.nbytes / MIB, point.loss),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=7,
        )
