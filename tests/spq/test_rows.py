from __future__ import annotations

import math
from pathlib import Path

import pytest

from spq.errors import ModelFileError
from spq.evaluate import Perplexity
from spq.footprint import Footprint
from spq.quality import Quality, composite
from spq.rows import Row, TaskScore, TextScore, make_row, read_rows, render_rows, write_rows

FOOTPRINT = Footprint(6 << 20, 5 << 20, 16 << 20, 8 << 20, 1000, 750, 3000)


def _score(nll: float, **more: float) -> TextScore:
    base = Perplexity(math.exp(2.0), 2.0, 90, 10, 10, False)
    return TextScore.of(Quality(Perplexity(math.exp(nll), nll, 90, 10, 10, False), base, **more), "ab")


def test_rows_survive_json_lines_and_infinity(tmp_path: Path) -> None:
    rows = [
        make_row("a", FOOTPRINT, {"books": _score(2.1, top1=0.9, kl=0.05)}, options={"bits": 4, "whiten": True}),
        Row(name="broken", texts={"books": TextScore(perplexity=math.inf, nll=800.0, num_tokens=1, protocol="p")}),
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    a = rows[0]
    assert (a.tcr, a.mcr, a.bits_per_weight) == (1 - 3000 / 16000, 1 - 6 / 16, 6.0)
    assert a.composite == composite(math.exp(-0.05), 0.25, 4.0)
    assert a.score is not None and a.score.sr_ppl == pytest.approx(math.exp(-0.1))


def test_table_shows_what_was_measured_and_dashes_for_the_rest() -> None:
    rows = [
        make_row("a", FOOTPRINT, {"books": _score(2.0), "c4": _score(2.2)}),
        make_row("http://x", None, {"books": _score(2.0)}, tasks={"gsm8k": TaskScore(
            value=0.25, stderr=None, num_questions=4, num_shots=0)}),
    ]  # fmt: skip
    lines = render_rows(rows).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[2][:6] == ["a", "books", "6.000", "5.000", "6.00", "7.3891"]
    assert cells[3][1] == "c4" and cells[4][0] == "http://x" and cells[4][2:5] == ["-", "-", "-"]
    assert cells[-1] == ["http://x", "gsm8k", "0.2500", "-", "4", "0"]
    assert len({len(row) for row in cells[:5]}) == 1


def test_a_damaged_file_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a"}\n\n{"name": "a", "speed": 3}\n')
    with pytest.raises(ModelFileError, match="line 3 is no row of results: speed"):
        read_rows(path)
    with pytest.raises(ModelFileError, match="not a readable file of rows"):
        read_rows(tmp_path / "none")
