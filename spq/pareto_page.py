"""The page of a report: one HTML file with its data, style and script inside, which loads nothing from anywhere.

Without a script the sentence and the table below the chart say the same. Nothing is measured here.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spq.pareto_script import SCRIPT, STYLE
from spq.quality import COMPOSITE_FORMULA, COMPOSITE_NAME
from spq.rows import MIB, Row

if TYPE_CHECKING:
    from spq.pareto import View


def render_page(rows: Sequence[Row], views: Sequence[View], title: str) -> str:
    """The whole document."""
    data = {
        "rows": [{"name": row.name, "facts": _facts(row)} for row in rows],
        "views": [
            {
                "text": view.text,
                "loss": view.loss,
                "points": [[p.row, p.nbytes / MIB, p.loss, int(p.on_front)] for p in view.points],
            }
            for view in views
        ],
    }
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    safe_title = html.escape(title)
    note = (
        "TCr and MCr: theoretical and measured compression rate. " if any(row.tcr is not None for row in rows) else ""
    )
    if any(row.composite is not None for row in rows):
        note += f"{COMPOSITE_NAME}: {COMPOSITE_FORMULA}."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe_title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header><h1>{safe_title}</h1>
<p class="lead">{html.escape(summary(rows, views[0]))}</p></header>
<section class="card" aria-label="chart">
<div class="controls" id="controls"></div>
<div class="chart" id="chart" role="img" aria-describedby="alternative"></div>
<div class="detail" id="detail" aria-live="polite"></div>
<p class="legend"><span><span class="key front"></span>on the front: nothing smaller is as good</span>
<span><span class="key rest"></span>another is at least as small and better (▲: off the scale)</span></p>
<noscript><p>The chart needs JavaScript; the table below has the same numbers.</p></noscript>
</section>
<section class="card">
<h2 id="alternative">All models, smallest first</h2>
<div class="scroll">{_table(rows, views)}</div>
<p class="note">Bytes are those of the weight files. {html.escape(note)}</p>
</section>
</main>
<script type="application/json" id="data">{embedded}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def summary(rows: Sequence[Row], view: View) -> str:
    """The picture in a sentence."""
    first, last = view.front[0], view.front[-1]
    drawn = f"{len(view.points)} models" if len(view.points) > 1 else "one model"
    ends = f"{rows[first.row].name} ({first.nbytes / MIB:.2f} MiB, {view.loss} {first.loss:.4g})"
    if last is not first:
        ends = f"from {ends} to {rows[last.row].name} ({last.nbytes / MIB:.2f} MiB, {last.loss:.4g})"
    missing = len(rows) - len(view.points)
    rest = f" {missing} more could not be drawn: no bytes, or no finite number." if missing else ""
    return f"Of {drawn} on {view.text}, {len(view.front)} on the front, {ends}.{rest}"


def _facts(row: Row) -> list[list[str]]:
    """What hovering shows: options first, then numbers."""
    facts = [[name.replace("_", " "), str(value)] for name, value in row.options.items()]
    numbers = [
        ("bits/weight", row.bits_per_weight, ".2f"),
        ("TCr", row.tcr, ".3f"),
        ("MCr", row.mcr, ".3f"),
        ("composite", row.composite, ".3f"),
        ("tokens/s", row.tokens_per_s, ".1f"),
    ]
    return facts + [[name, format(value, spec)] for name, value, spec in numbers if value is not None]


def _table(rows: Sequence[Row], views: Sequence[View]) -> str:
    """Every row, smallest first, with the columns that at least one of them fills."""
    front = {point.row for point in views[0].front}
    order = sorted(range(len(rows)), key=lambda index: (rows[index].file_bytes is None, rows[index].file_bytes or 0))
    columns = [column for column in _columns(rows) if any(value is not None for value in column[2])]
    lines = []
    for index in order:
        options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in rows[index].options.items())
        more = f"<small>{html.escape(options)}</small>" if options else ""
        hidden = "" if index in front else " hidden"
        name = f'<th scope="row">{html.escape(rows[index].name)}<span class="mark"{hidden}>front</span>{more}</th>'
        cells = "".join(
            "<td>–</td>" if values[index] is None else f"<td>{values[index]:{spec}}</td>" for _, spec, values in columns
        )
        lines.append(f'<tr data-row="{index}">{name}{cells}</tr>')
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name, _, _ in columns)
    return f'<table><thead><tr><th scope="col">model</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _columns(rows: Sequence[Row]) -> list[tuple[str, str, list[float | None]]]:
    """(heading, format, value of every row)."""
    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    columns: list[tuple[str, str, list[float | None]]] = [
        ("MiB", ".2f", [None if row.file_bytes is None else row.file_bytes / MIB for row in rows]),
        ("bits/weight", ".2f", [row.bits_per_weight for row in rows]),
    ]
    for text in texts:
        scores = [row.texts.get(text) for row in rows]
        columns += [
            (f"perplexity {text}", ".3f", [None if s is None else s.perplexity for s in scores]),
            ("top-1", ".4f", [None if s is None else s.top1 for s in scores]),
            ("KL", ".4f", [None if s is None else s.kl for s in scores]),
            ("Sr_ppl", ".4f", [None if s is None else s.sr_ppl for s in scores]),
        ]
    columns += [
        (name, spec, [getattr(row, field) for row in rows])
        for name, spec, field in (
            ("TCr", ".3f", "tcr"),
            ("MCr", ".3f", "mcr"),
            ("composite", ".3f", "composite"),
            ("tokens/s", ".1f", "tokens_per_s"),
        )
    ]
    return columns
