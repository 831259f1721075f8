from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spq.errors import OptionError
from spq.pareto import main, make_views, on_front, write_report
from spq.rows import MIB, Row, TextScore, read_rows, write_rows

SMALL = st.integers(0, 6)


def _row(name: str, mib: float | None, nll: float, **more: float) -> Row:
    score = TextScore(perplexity=math.exp(nll), nll=nll, num_tokens=10, protocol="p", **more)
    size = None if mib is None else int(mib * MIB)
    return Row(name=name, file_bytes=size, texts={"books": score}, options={"bits": 4, "kind": "<b>"})


@given(st.lists(st.tuples(SMALL, SMALL), max_size=25))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(a: tuple[int, int]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points)

    assert on_front(points) == [not dominated(point) for point in points]


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), min_size=1, max_size=25))
def test_the_front_falls_and_holds_both_ends(points: list[tuple[float, float]]) -> None:
    front = sorted({p for p, flag in zip(points, on_front(points), strict=True) if flag})
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
    assert front[0] == min(points) and front[-1][1] == min(loss for _, loss in points)


def test_views_leave_out_what_cannot_be_drawn() -> None:
    rows = [
        _row("a", 2.0, 1.0, kl=0.2),
        _row("b", 1.0, 2.0, kl=0.1),
        _row("server", None, 1.0),
        Row(name="broken", file_bytes=1, texts={"books": TextScore(perplexity=math.inf, nll=900, num_tokens=1,
            protocol="p")}),
    ]  # fmt: skip
    views = {(view.text, view.loss): view for view in make_views(rows)}
    assert set(views) == {("books", "perplexity"), ("books", "KL (nats/token)")}
    assert [(p.row, p.on_front) for p in views["books", "perplexity"].points] == [(1, True), (0, True)]
    assert [(p.row, p.on_front) for p in views["books", "KL (nats/token)"].points] == [(1, True), (0, False)]


def test_the_page_is_self_contained_and_has_the_numbers(tmp_path: Path) -> None:
    rows = [
        _row("int8 & more", 3.25, 2.0, top1=0.98765),
        _row("</script><img src=x>", 2.0, 2.5, top1=0.91234),
        _row("worse", 4.0, 2.4),
    ]
    written = write_report(rows, tmp_path / "report", title="Bytes <against> loss")
    page = (tmp_path / "report" / "pareto.html").read_text("utf-8")
    assert not re.search(r"(?i)https?:|//[a-z0-9.-]+\.[a-z]{2,}|@import|url\(|<link|<img|src=(?!x)", page)
    assert "Bytes &lt;against&gt; loss" in page and "int8 &amp; more" in page
    assert page.count("</script>") == 2 and "<b>" not in page.partition("<script>")[0]
    table = re.findall(r'<tr data-row="(\d)"><th.*?<span class="mark"( hidden)?>.*?</th>(.*?)</tr>', page)
    assert [(row, not hidden) for row, hidden, _ in table] == [("1", True), ("0", True), ("2", False)]
    cells = [re.findall("<td>(.*?)</td>", found) for _, _, found in table]
    assert cells == [["2.00", "12.182", "0.9123"], ["3.25", "7.389", "0.9877"], ["4.00", "11.023", "–"]]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
    assert data["views"][0]["points"][1] == [0, 3.25, pytest.approx(math.exp(2.0)), 1]
    assert data["rows"][0]["facts"][:2] == [["bits", "4"], ["kind", "<b>"]]
    assert "Of 3 models on books, 2 on the front, from &lt;/script" in page
    assert read_rows(written[0]) == rows


def test_the_picture(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib (the extra plots) is not installed")
    rows = [_row(str(n), 1.0 + n, 3.0 - 0.2 * n) for n in range(5)] + [_row("far", 90.0, 6.0)]
    png = write_report(rows, tmp_path)[2].read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (1600, 1000)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows([_row("a", 1.0, 1.0)], tmp_path / "rows.jsonl")
    assert main([str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out")]) == 0
    assert "pareto.html" in capsys.readouterr().out
    assert main([str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(OptionError, match="nothing can be drawn"):
        write_report([_row("server", None, 1.0)], tmp_path)
