from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spq.calibrate import bundled_calibration, choose_windows, read_text, text_hash, tokenize
from spq.errors import CalibrationError


def test_windows_are_contiguous_disjoint_and_seeded() -> None:
    ids = torch.arange(1000)
    windows, spare = choose_windows(ids, 5, 64, seed=1)
    assert windows.shape == (5, 64)
    assert (windows.diff(dim=1) == 1).all() and (windows[:, 0] % 64 == 0).all()
    assert windows.unique().numel() == 5 * 64
    assert torch.equal(windows, choose_windows(ids, 5, 64, seed=1)[0])
    assert not torch.equal(windows, choose_windows(ids, 5, 64, seed=2)[0])
    assert spare is not None and spare.shape == (5, 64)
    assert torch.cat((windows, spare)).unique().numel() == 10 * 64  # nothing is measured on what was fitted to
    assert choose_windows(ids, 15, 64, seed=1)[1] is None


def test_short_text_is_refused_with_numbers() -> None:
    with pytest.raises(CalibrationError, match="100 tokens, but 2 windows of 64 need 128"):
        choose_windows(torch.arange(100), 2, 64, seed=0)


def test_tokenize_adds_nothing(make_model: Callable[..., Path]) -> None:
    ids = tokenize(make_model(), "ab a")
    assert ids.dtype == torch.int64 and ids.numel() == 4 and ids[0] == ids[3]


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"{tmp_path}: its tokenizer cannot be used"):
        tokenize(tmp_path, "text")


def test_bundled_text_is_there_and_real() -> None:
    text = read_text(bundled_calibration())
    assert 300_000 < len(text) < 500_000 and "<|" not in text
    assert len(text_hash(text)) == 64 and text_hash(text) != text_hash(text[1:])


def test_bundled_text_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("spq.calibrate.__file__", str(tmp_path / "spq" / "calibrate.py"))
    with pytest.raises(CalibrationError, match=r"only there in a clone .* --calibration FILE"):
        bundled_calibration()


def test_unreadable_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="bad: not a readable UTF-8"):
        read_text(tmp_path / "bad")
