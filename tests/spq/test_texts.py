from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spq.errors import CalibrationError
from spq.texts import c4, plain_text, wikitext


def test_wikitext_is_joined_by_blank_lines_and_unk_is_a_word(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(" \n = A <unk> = \n \n One line . \n")
    found = wikitext(tmp_path)
    assert (found.name, found.text) == ("wikitext2", "\n\n = A unk = \n\n\n\n\n One line . \n")
    assert len(found.sha256) == 64
    (tmp_path / "wiki.test.raw").write_text(" = A <unk> = \n\nTwo\n")
    raw = wikitext(tmp_path)
    assert (raw.name, raw.text) == ("wikitext2-raw", " = A <unk> = \n\n\n\n\nTwo\n")


def test_c4_documents_are_joined_by_spaces_whatever_separators_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "c4.jsonl"
    documents = ["one\ntwo", "th\u2028ree", "four"]
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in documents) + "\n\n", "utf-8")
    assert c4(path).text == "one\ntwo th\u2028ree four" and c4(path).name == "c4"
    assert plain_text(path).name == "c4"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"text": 1}', '{"words": "a"}'])
def test_refusals_name_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c4.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=r"c4\.jsonl"):
        c4(path)
    with pytest.raises(CalibrationError, match=r"no wiki\.test\.raw"):
        wikitext(tmp_path)
    with pytest.raises(CalibrationError, match="not a readable"):
        plain_text(tmp_path / "absent.txt")


def test_real_data(real_model: Callable[[str], Path]) -> None:
    data = real_model("stories260K").parents[1] / "data"
    if not data.is_dir():
        pytest.skip("../shared/data is not here")
    text = wikitext(data / "wikitext2").text
    assert "<unk>" not in text and " unk " in text and text.count("\n = Robert unk = \n") == 1
    assert len(c4(data / "c4_sample" / "c4_sample.jsonl").text) > 2_000_000
