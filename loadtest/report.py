"""The report of a comparison: one table, sentences of verdict, pictures, facts; as Markdown and as one HTML file.

What to say, not how it looks in HTML (`page`) or in pictures (`plots`). All of it is made from `Results`, which are
written too, so that runs can be added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest import page, plots, verdict
from loadtest.turns import Cell, Memory, Turn, Work, summarize

RESULTS, MARKDOWN, PAGE = "results.json", "report.md", "report.html"
MIB = 1 << 20
HEADER = ["server", "bits", "streams", "tokens/s [lowest..highest turn]", "subject / it", "TTFT p50 / p95 ms",
          "ITL p50 / p95 ms", "memory MiB", "others, cores"]  # fmt: skip


@dataclass(slots=True)
class Results:
    """What a comparison found. `subject` is the server that ratios are of."""

    subject: str
    facts: dict[str, Any]
    bits: dict[str, int]  # of the weights, by server; 0: not known
    turns: list[Turn]
    memory: dict[str, Memory]

    def save(self, folder: Path) -> None:
        """Write all of it. Times are rounded to 10 us."""
        plain = asdict(self)
        for turn in plain["turns"]:
            turn["ttft_s"] = [round(t, 5) for t in turn["ttft_s"]]
            turn["itl_s"] = [round(t, 5) for t in turn["itl_s"]]
        (folder / RESULTS).write_text(json.dumps(plain) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Results:
        """What `save` wrote. Raises OSError, ValueError."""
        plain = json.loads((folder / RESULTS).read_text("utf-8"))
        turns = [Turn(**{**turn, "work": None if turn["work"] is None else Work(**turn["work"])})
                 for turn in plain["turns"]]  # fmt: skip
        memory = {name: Memory(**figures) for name, figures in plain["memory"].items()}
        return cls(plain["subject"], plain["facts"], plain["bits"], turns, memory)


def write(results: Results, folder: Path) -> None:
    """Markdown, pictures, page. The work must have been found equal before."""
    cells = summarize(results.turns)
    names = {
        "throughput-latency.png": plots.throughput_latency(cells),
        "tokens-over-time.png": plots.tokens_over_time(results.turns),
    }
    if any(m.kinds or m.ledger or m.peak_bytes for m in results.memory.values()):
        names["memory.png"] = plots.memory(results.memory)
    for name, picture in names.items():
        (folder / name).write_bytes(picture)
    table, said, facts = rows(cells, results), sentences(results), facts_of(results)
    text = [f"# {title(results)}", "", *markdown_table(HEADER, table), "", "## Verdict", ""]
    text += [f"- {sentence}" for sentence in said] + [""]
    text += [f"![{name.removesuffix('.png')}]({name})" for name in names]
    text += ["", "## How", "", *markdown_table(["", ""], facts)]
    (folder / MARKDOWN).write_text("\n".join(text) + "\n", "utf-8")
    (folder / PAGE).write_text(page.render(title(results), HEADER, table, said, names, facts), "utf-8")


def write_refusal(results: Results, reason: str, folder: Path) -> None:
    """In the place of a table: why there is none."""
    text = f"Not compared, because the work was not equal: {reason}"
    (folder / MARKDOWN).write_text(f"# {title(results)}\n\n{text}\n", "utf-8")
    (folder / PAGE).write_text(page.render(title(results), [], [], [text], {}, facts_of(results)), "utf-8")


def title(results: Results) -> str:
    """The servers compared."""
    others = [name for name in results.bits if name != results.subject]
    return f"{results.subject} beside {', '.join(others)}" if others else f"{results.subject} alone"


def rows(cells: Sequence[Cell], results: Results) -> list[list[str]]:
    """The table: by level, then in the order of the servers."""
    order = list(results.bits)
    ratios = {
        (rival, row.streams): row.with_spread()
        for rival in order if rival != results.subject
        for row in verdict.rows(results.subject, rival, results.turns, results.memory) if row.figure == "tokens/s"
    }  # fmt: skip
    table = []
    for c in sorted(cells, key=lambda cell: (cell.streams, order.index(cell.server))):
        peak = results.memory[c.server].peak_bytes if c.server in results.memory else 0
        others = "not known" if c.others_cores is None else f"{c.others_cores:.2f}{' noisy' if c.noisy else ''}"
        table.append([
            c.server, str(results.bits[c.server] or ""), str(c.streams),
            f"{c.tokens_per_s:.1f} [{c.tokens_per_s_min:.1f}..{c.tokens_per_s_max:.1f}]",
            ratios.get((c.server, c.streams), ""),
            f"{c.ttft_p50_ms:.0f} / {c.ttft_p95_ms:.0f}", f"{c.itl_p50_ms:.1f} / {c.itl_p95_ms:.1f}",
            f"{peak / MIB:.0f}" if peak else "", others,
        ])  # fmt: skip
    return table


def sentences(results: Results) -> list[str]:
    """Of every rival, with the count of its rows first."""
    said = []
    for rival in results.bits:
        if rival != results.subject:
            found = verdict.rows(results.subject, rival, results.turns, results.memory)
            said.append(verdict.sentence(results.subject, rival, found, results.bits) + f" {verdict.count(found)}.")
    return said


def facts_of(results: Results) -> list[list[str]]:
    """What the figures depend on, one line each."""
    return [[name, _plain(value)] for name, value in results.facts.items()]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {inner}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown_table(header: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of it; bars in cells are escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
