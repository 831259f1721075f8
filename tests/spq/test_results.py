from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spq.results import Row, main, verdict


def test_verdict_is_computed() -> None:
    rows = [
        Row("float16", 1000, 1.0, 10.0, 0, 0, None),
        Row("int8 alone", 500, 0.5, 10.0, 0, 0, 1.0),
        Row("a", 450, 0.45, 10.5, 1, 0, 1.0),  # -10 % bytes, +5 %
        Row("b", 490, 0.49, 10.5, 0, 9, 1.0),  # -2 %, +5 %
        Row("c", 600, 0.6, 10.5, 0, 9, 1.0),
        Row("d", 500, 0.5, 10.0, 0, 0, 1.0),
        Row("default (SPQ)", 450, 0.45, 10.1, 1, 0, 1.0),
    ]
    text = verdict(rows)
    assert "int8 alone takes 50.0% of float16 for +0.00% perplexity." in text
    assert "a: -10.00% bytes and +5.00% perplexity against int8 alone: pays." in text
    assert "b: -2.00% bytes and +5.00% perplexity against int8 alone: does not pay." in text
    assert "c: +20.00% bytes and +5.00% perplexity against int8 alone: dominated (no fewer bytes)." in text
    assert "d: +0.00% bytes and +0.00% perplexity against int8 alone: changes nothing." in text
    assert text.endswith("SVD and pruning together (default): pay.")


def test_a_real_model(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    models = real_model("stories260K").parent
    stories = models.parent / "data" / "tinystories_sample" / "tinystories_sample.txt"
    if not stories.is_file():
        pytest.skip("TinyStories sample is not here")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "stories260K").symlink_to(models / "stories260K")
    short = tmp_path / "stories.txt"
    short.write_text(stories.read_text()[:200_000])
    out = tmp_path / "results.md"
    arguments = ["--models", str(tmp_path / "models"), "--stories", str(short), "--max-tokens", "4000"]
    assert main([*arguments, "--out", str(out)]) == 0
    text = out.read_text()
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in table][:2] == ["float16", "int8 alone"] and len(table) == 7
    base, int8 = float(table[0][3]), float(table[1][3])
    assert 4.0 < base < 6.0 and abs(int8 / base - 1) < 0.01
    assert "Verdict (computed)" in text and str(tmp_path) not in text


def test_nothing_to_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("one\ntwo\nthree\n")
    assert main(["--models", str(tmp_path), "--stories", str(tmp_path / "t")]) == 2
    assert "no model with a text" in capsys.readouterr().err
