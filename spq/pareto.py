"""Size against loss: which of many compressed models are worth having, as a picture and a page.

A model is on the front where no other is at least as small and at least as good, and better in one of the two.
`python -m spq.pareto ROWS -o FOLDER` draws the rows that `spq-eval --json` printed; a search calls `write_report`.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spq.errors import OptionError, OutputError, SpqError
from spq.pareto_page import render_page
from spq.rows import Row, TextScore, read_rows, write_rows

LOSSES: dict[str, Callable[[TextScore], float | None]] = {
    "perplexity": lambda score: score.perplexity,
    "KL (nats/token)": lambda score: score.kl,
    "top-1 disagreement": lambda score: None if score.top1 is None else 1.0 - score.top1,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One row in one view."""

    row: int  # index
    nbytes: int
    loss: float
    on_front: bool


@dataclass(frozen=True, slots=True)
class View:
    """One loss on one text, with every row that has both numbers, smallest first."""

    text: str
    loss: str
    points: tuple[Point, ...]

    @property
    def front(self) -> tuple[Point, ...]:
        """The points on it, smallest first."""
        return tuple(point for point in self.points if point.on_front)


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For (bytes, loss) pairs, whether each is on the front. Equal points are on it together."""
    flags = [False] * len(points)
    best_loss, best_size = math.inf, math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        size, loss = points[index]
        if loss < best_loss or (loss == best_loss and size == best_size):
            flags[index] = True
            best_loss, best_size = loss, size
    return flags


def make_views(rows: Sequence[Row]) -> list[View]:
    """Every text and loss that at least one row has, with bytes; rows without a finite number stay out of a view."""
    texts = dict.fromkeys(text for row in rows for text in row.texts)
    views = []
    for text in texts:
        for loss, read in LOSSES.items():
            found = []
            for index, row in enumerate(rows):
                value = read(row.texts[text]) if text in row.texts else None
                if row.file_bytes is not None and value is not None and math.isfinite(value):
                    found.append((row.file_bytes, value, index))
            flags = on_front([(size, value) for size, value, _ in found])
            points = [Point(index, size, value, flag) for (size, value, index), flag in zip(found, flags, strict=True)]
            if points:
                views.append(View(text, loss, tuple(sorted(points, key=lambda point: (point.nbytes, point.loss)))))
    return views


def write_report(rows: Sequence[Row], out_dir: Path, *, title: str = "Size against quality") -> list[Path]:
    """Write rows.jsonl, pareto.html and, where matplotlib is installed (the extra plots), pareto.png of the first view.

    Returns what was written. Raises OptionError where no row has bytes and a finite loss, OutputError where the folder
    cannot be written.
    """
    views = make_views(rows)
    if not views:
        raise OptionError("no row has both file bytes and a finite perplexity; nothing can be drawn")
    written = [out_dir / "rows.jsonl", out_dir / "pareto.html"]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_rows(rows, written[0])
        written[1].write_text(render_page(rows, views, title), "utf-8")
        if importlib.util.find_spec("matplotlib") is not None:
            from spq.pareto_plot import write_png

            written.append(out_dir / "pareto.png")
            write_png(rows, views[0], title, written[2])
    except OSError as error:
        raise OutputError(f"{out_dir}: cannot be written ({error})") from error
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, or 2 for anything the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m spq.pareto", description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help="JSON lines, as spq-eval --json prints them")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--title", default="Size against quality", help="of the page and the picture")
    arguments = parser.parse_args(argv)
    try:
        rows = [row for path in arguments.rows for row in read_rows(path)]
        written = write_report(rows, arguments.out, title=arguments.title)
    except SpqError as error:
        print(f"spq.pareto: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, written)))
    if len(written) == 2:
        print("no pareto.png: matplotlib is not installed (the extra plots)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
