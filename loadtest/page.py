"""A report as one HTML file that loads nothing: pictures and style are in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem}
body{color:#1b1b1b;background:#fff}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}
img{max-width:100%;height:auto}figure{margin:1.5rem 0}.wide{overflow-x:auto}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}img{background:#fff}}"""


def render(
    title: str,
    header: Sequence[str],
    table: Sequence[Sequence[str]],
    sentences: Sequence[str],
    pictures: Mapping[str, bytes],
    facts: Sequence[Sequence[str]],
) -> str:
    """The page; all text is escaped."""
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">', f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head><body>", f"<h1>{escape(title)}</h1>", _table(header, table), "<h2>Verdict</h2>",
        "<ul>", *(f"<li>{escape(sentence)}</li>" for sentence in sentences), "</ul>",
        *(_picture(name, data) for name, data in pictures.items()), "<h2>How</h2>", _table([], facts), "</body></html>",
    ]  # fmt: skip
    return "\n".join(part for part in parts if part) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>" if header else ""
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{head}\n{body}</table></div>'


def _picture(name: str, data: bytes) -> str:
    text = escape(name.removesuffix(".png").replace("-", " "))
    return f'<figure><img alt="{text}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></figure>'
