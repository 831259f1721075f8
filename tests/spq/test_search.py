from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spq import search
from spq.compress import compress
from spq.rows import read_rows

SMALL = ["--variance", "1,0.9", "--prune", "0", "--bits", "8,4", "--correction", "0", "--budgets", "0.4"]
POINTS = {"original", "v1 p0 b8 c0", "v1 p0 b4 c0", "v0.9 p0 b8 c0", "v0.9 p0 b4 c0", "budget 0.4"}


@pytest.fixture
def command(make_model: Callable[..., Path], text: str, tmp_path: Path) -> list[str]:
    (tmp_path / "text").write_text(text)
    (tmp_path / "other").write_text(text[::-1])
    files = ["--text", str(tmp_path / "text"), "--evaluate", str(tmp_path / "other"), "--max-tokens", "640"]
    return [str(make_model()), "-o", str(tmp_path / "found"), "--device", "cpu", *files, *SMALL]


def test_a_stopped_search_goes_on_and_ends_with_a_front(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []

    def stopping(*args: object, **named: object) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(Path(str(args[1])))
        return compress(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "compress", stopping)
    assert search.main(command) == 130
    found = tmp_path / "found"
    assert {row.name for row in read_rows(found / "rows.jsonl")} == {"original", "v1 p0 b8 c0", "v1 p0 b4 c0"}
    assert [path.name for path in found.iterdir()] == ["rows.jsonl"]
    made.clear()
    monkeypatch.setattr(search, "compress", lambda *args, **named: made.append(args[1]) or compress(*args, **named))
    assert search.main(command) == 0
    assert len(made) == 3 and not any(path.exists() for path in made)
    rows = {row.name: row for row in read_rows(found / "rows.jsonl")}
    assert rows.keys() == POINTS and "On the front" in capsys.readouterr().out
    assert rows["original"].score.kl == pytest.approx(0, abs=1e-6)  # type: ignore[union-attr]
    assert all(row.file_bytes and row.score and row.score.sr_kl for row in rows.values())
    assert "v1 p0 b4 c0" in (found / "pareto.html").read_text("utf-8")
    made.clear()
    assert search.main(command) == 0 and not made
    assert search.main([*command, "--max-tokens", "320"]) == 0 and len(made) == 5  # another protocol: nothing is reused


def test_a_point_that_cannot_be_made_is_left_out_by_name(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main([*command, "--variance", "", "--budgets", "0.01,0.5"]) == 0
    assert {row.name for row in read_rows(tmp_path / "found" / "rows.jsonl")} == {"original", "budget 0.5"}
    assert "budget 0.01 is left out: a budget of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--bits", "3"], "option bits"),
        (["--prune", "1.5"], "option max_prune_ratio"),
        (["--max-tokens", "1"], "--max-tokens 1"),
    ],
)
def test_what_means_nothing_is_named(
    command: list[str], capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert search.main([*command, *extra]) == 2
    assert message in capsys.readouterr().err


def test_the_calibration_text_is_not_measured_on(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main([*command, "--evaluate", str(tmp_path / "text")]) == 2
    assert "is the calibration text; measure on another one" in capsys.readouterr().err
