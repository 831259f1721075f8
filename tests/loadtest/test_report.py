"""The files of a report: complete, self-contained, the same after a reload."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import results

from loadtest import report


def test_a_report_is_self_contained(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(results(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.md", "report.html", "throughput-latency.png", "tokens-over-time.png", "memory.png"}
    for path in tmp_path.iterdir():
        assert b"http:" not in path.read_bytes() and b"https:" not in path.read_bytes(), path.name
        assert path.suffix != ".png" or path.read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and 'src="data:' in page and "href" not in page
    assert "one &lt;of&gt; many" in page
    text = (tmp_path / "report.md").read_text()
    assert "| b | 4 | 8 | 11.5 [11.0..12.0] | 1.87 [1.83..1.91] | 100 / 100 |" in text
    assert "a: x \\| y" in text, "a bar in a cell would end it"
    assert "a beside b: better in tokens/s" in text and "a beside b: better in tokens/s" in page


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    made = results()
    made.save(tmp_path)
    assert report.Results.load(tmp_path) == made


def test_a_refusal_takes_the_place_of_the_table(tmp_path: Path) -> None:
    report.write_refusal(results(), "different prompts", tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "the work was not equal: different prompts" in text and "tokens/s" not in text
