"""The dashboard's queries with their variables filled in, and the picture of their answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.panels import Panel, Query, everything, fill, load, panels
from benchmarks.prometheus import Series


def panel(kind: str = "timeseries", unit: str = "s", stacked: bool = False) -> Panel:
    return Panel("A title", "A row", kind, unit, stacked, (0, 0, 24, 8), (Query("x", "{{job}}", kind != "timeseries"),))


def test_variables_are_filled() -> None:
    assert fill('rate(x{job=~"$job"}[$__rate_interval])', everything("10s")) == 'rate(x{job=~"spq|gptq"}[10s])'
    with pytest.raises(KeyError, match="nobody"):
        fill("x{a=$nobody}", everything("10s"))
    for one in panels(load(), everything("10s")):
        assert all("$" not in query.expr for query in one.queries), one.title


def test_a_legend_names_the_series() -> None:
    assert Query("x", "{{job}} {{instance}} p50", False).name({"job": "spq", "instance": "a:1"}) == "spq a:1 p50"
    assert Query("x", "{{ kind }}{{missing}}", False).name({"kind": "kv"}) == "kv"


def test_panels_keep_their_places_and_rows() -> None:
    found = {one.title: one for one in panels(load(), everything("10s"))}
    assert found["Generated tokens per second"].row == "Throughput"
    assert found["Ready"].queries[0].instant
    assert found["spq: device memory by kind"].stacked
    assert not found["Host: resident memory of the process"].stacked


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(1536.0, "bytes", "1.5 KiB"), (0.0, "bytes", "0 B"), (0.25, "percentunit", "25 %"), (0.0125, "s", "12.5 ms"),
     (3.0, "s", "3 s"), (0.0, "s", "0 s"), (12345.0, "none", "1.234e+04"), (float("nan"), "percentunit", "nan %")],
)  # fmt: skip
def test_values_are_shown_with_their_unit(value: float, unit: str, text: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots")
    from benchmarks.panel_plot import shown

    assert shown(value, unit) == text


def test_a_picture_is_drawn_of_all_kinds_of_panels(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots")
    from benchmarks.panel_plot import write_png

    line = Series({"job": "spq"}, [(100.0, 1.0), (101.0, float("nan")), (102.0, 3.0)])
    answers = [
        (panel(), [[("spq", line)]]),
        (panel(unit="bytes", stacked=True), [[("a", line), ("b", line)], [("all", line)]]),
        (panel("stat"), [[("spq", line)]]),
        (panel("table"), [[("spq", line)]]),
        (panel(), [[]]),
    ]
    write_png(answers, "A title", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
