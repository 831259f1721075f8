"""Budgeted SPQ beside GPTQ: what may be said of two rows that were measured on the same windows.

Not the page (`results_page`). A difference of perplexity is told with its error, from the windows in pairs: some
thousand tokens cannot tell apart what differs by less than twice that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from spq.rows import Row, TextScore
from spq.trials import AT

NO_GPTQ = "GPTQ: not run here, needs GPTQModel (benchmarks/README.md)."
WHY = (
    "Where it is worse on the second text alone, its KL grows more from the first text to the second than GPTQ's: "
    "errors, sensitivities and the choice itself are measured on calibration text of the first kind. Rounding costs "
    "much the same on any text; what pairs, corrections and dropped neurons lose was chosen to matter little on that "
    "kind."
)
UNKNOWN = "Why it is worse is not known."


def against_gptq(rows: Mapping[str, Row]) -> str:
    """At GPTQ's bytes, and the bytes at GPTQ's perplexity."""
    rivals = [row for name, row in rows.items() if name.startswith("GPTQ ")]
    if not rivals:
        return NO_GPTQ
    said, reasons = [], set()
    for rival in rivals:
        ours = rows.get(f"SPQ budgeted{AT}{rival.name}")
        if ours is None or not ours.texts:
            said.append(f"{rival.name}: no budgeted model of its bytes is measured.")
            continue
        found = [versus(ours.texts[text], theirs, text) for text, theirs in rival.texts.items()]
        reasons |= {reason(ours, rival, i) for i, words in enumerate(found) if "**worse**" in words}
        bytes_said = f"{(ours.file_bytes or 0) / 1024:.1f} to {(rival.file_bytes or 0) / 1024:.1f} KiB"
        kept = ours.options.get("kept")
        chosen = f", chosen from {kept}" if kept else ""
        said.append(f"Budgeted SPQ at the bytes of {rival.name} ({bytes_said}{chosen}): {'; '.join(found)}.")
        said.append(_bytes_at_quality(rival, rows))
    return " ".join([*said, *sorted(reasons)])


def reason(ours: Row, rival: Row, index: int) -> str:
    """Why `ours` is worse on the text of this index, as far as the figures tell."""

    def growth(row: Row) -> float:
        kls = [score.kl or 0.0 for score in row.texts.values()]
        return kls[index] / kls[0] if kls[0] > 0 else math.inf

    return WHY if index > 0 and growth(ours) > growth(rival) else UNKNOWN


def versus(mine: TextScore, theirs: TextScore, text: str) -> str:
    """Better, worse, or not told apart, with both figures."""
    figures = (
        f"on {text} ({mine.perplexity:.3f} to {theirs.perplexity:.3f}, KL {mine.kl or 0:.5f} to {theirs.kl or 0:.5f}"
    )
    percent, error = difference(mine, theirs)
    if math.isnan(error):
        word = "at least as good" if percent <= 0 else "**worse**"
        return f"{word} {figures})"
    word = "not told apart" if abs(percent) <= 2 * error else ("better" if percent < 0 else "**worse**")
    return f"{word} {figures}; {percent:+.2f} % \u00b1 {error:.2f})"


def difference(mine: TextScore, theirs: TextScore) -> tuple[float, float]:
    """Of two perplexities in percent, and its standard error over the windows; NaN where these are not known."""
    percent = 100 * (mine.perplexity / theirs.perplexity - 1)
    if len(mine.by_window) < 2 or len(mine.by_window) != len(theirs.by_window):
        return percent, math.nan
    pairs = [a - b for a, b in zip(mine.by_window, theirs.by_window, strict=True)]
    return percent, 100 * statistics.stdev(pairs) / math.sqrt(len(pairs)) * mine.perplexity / theirs.perplexity


def _bytes_at_quality(rival: Row, rows: Mapping[str, Row]) -> str:
    text, theirs = next(iter(rival.texts.items()))
    good = [
        row
        for name, row in rows.items()
        if name.startswith("SPQ budgeted") and row.texts and row.texts[text].perplexity <= theirs.perplexity
    ]
    if not good:
        return f"No measured budget reaches its perplexity on {text}."
    least = min(good, key=lambda row: row.file_bytes or 0)
    share = (least.file_bytes or 0) / (rival.file_bytes or 1)
    return f"The smallest measured budget with its perplexity on {text} or a lower one takes {share:.1%} of its bytes."
