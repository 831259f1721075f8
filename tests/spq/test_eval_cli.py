from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import CalibrationError
from spq.eval_cli import main
from spq.evaluate import evaluate_folder
from spq.rows import read_rows
from spq.tasks import NEEDS, read_gsm8k, read_truthfulqa

CPU = torch.device("cpu")


@pytest.fixture
def text_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(text)
    return path


def test_plain_and_packed_against_the_original(
    make_model: Callable[..., Path], tmp_path: Path, text: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, packed = make_model(), tmp_path / "packed"
    compress(folder, packed, SPQConfig.preset("int8"), calibration_text="", device=CPU)
    arguments = [str(folder), str(packed), "--text", str(text_file), "--reference", str(folder), "--window", "32"]
    assert main([*arguments, "--max-tokens", "640", "--device", "cpu", "--json"]) == 0
    (tmp_path / "rows.jsonl").write_text(capsys.readouterr().out)
    plain, int8 = read_rows(tmp_path / "rows.jsonl")
    expected = evaluate_folder(packed, text, device=CPU, window=32, max_tokens=640)
    assert int8.texts["fox"].perplexity == pytest.approx(expected.value, rel=1e-6)
    assert plain.texts["fox"].kl == 0.0 and plain.texts["fox"].top1 == 1.0
    assert 0 < int8.texts["fox"].kl < 0.01 and int8.tcr == 0.5  # type: ignore[operator]
    assert int8.texts["fox"].base_perplexity == plain.texts["fox"].perplexity
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"| {packed} | fox |" in out and "our reading" in out


def test_bos_and_wikitext_and_c4(
    make_model: Callable[..., Path], tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model()
    (tmp_path / "test.txt").write_text(text)
    (tmp_path / "c4.jsonl").write_text(json.dumps({"text": text}) + "\n")
    arguments = [str(folder), "--wikitext", str(tmp_path), "--c4", str(tmp_path / "c4.jsonl"), "--bos", "--json"]
    assert main([*arguments, "--dtype", "float32"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert list(row["texts"]) == ["wikitext2", "c4"]
    expected = evaluate_folder(folder, text, device=CPU, use_bos=True)
    assert row["texts"]["c4"]["perplexity"] == pytest.approx(expected.value, rel=1e-6)
    assert row["texts"]["c4"]["protocol"] == expected.protocol and row["texts"]["c4"]["kl"] is None


BAD = [
    (["{m}"], "nothing to measure"),
    (["{m}", "--text", "{t}", "--text", "{t}"], "two texts are named 'fox'"),
    (["{m}", "--text", "{t}.absent"], "not a readable UTF-8 text file"),
    (["{m}", "--text", "{t}", "--window", "65"], "the model's context is 64"),
    (["{m}", "--text", "{t}", "--window", "0"], "--window 0: give at least 1"),
    (["{m}", "--text", "{t}", "--limit", "3"], "--limit without a task"),
    (["{m}", "--text", "{t}", "--concurrency", "3"], "--concurrency without a URL"),
    (["{m}", "--text", "{t}", "--tokenizer", "{m}"], "--tokenizer without a task by URL"),
    (["{m}", "--truthfulqa", "{t}", "--reference", "{m}"], "--reference without a text"),
    (["{m}", "--truthfulqa", "{t}", "--gsm8k-shots", "{t}"], "--gsm8k-shots without --gsm8k"),
    (["http://127.0.0.1:9", "--text", "{t}", "--threads", "1"], "--threads without a folder"),
    (["{m}/absent", "--text", "{t}"], "neither a folder nor a Hugging Face id"),
    (["{m}", "--text", "{t}", "--reference", "{t}"], "neither a folder nor"),
    (["{m}", "--text", "{t}", "--device", "tpu"], "device 'tpu'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, make_model: Callable[..., Path], text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = make_model()
    assert main([argument.format(m=folder, t=text_file) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("spq-eval: ") and message in error


def test_without_the_harness_the_extra_is_named(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec

    def hidden(name: str, package: str | None = None) -> object:
        return None if name == "lm_eval" else found(name, package)

    monkeypatch.setattr("spq.tasks.importlib.util.find_spec", hidden)
    assert main([str(make_model()), "--gsm8k", str(tmp_path / "gsm.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "install the extra eval" in error and "lm_eval" in error and "lm_eval" in NEEDS


def test_task_files(tmp_path: Path) -> None:
    path = tmp_path / "mc.json"
    targets = {"no": 0, "yes": 1, "also": 1}
    path.write_text(json.dumps([{"question": "q", "mc1_targets": {"b": 0, "a": 1}, "mc2_targets": targets}]))
    assert read_truthfulqa(path) == [
        {
            "question": "q",
            "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["yes", "also", "no"], "labels": [1, 1, 0]},
        }
    ]
    for content in ("[]", "{", '[{"question": "q"}]', '[{"question": "q", "mc1_targets": {"a": 0}}]', "[1]"):
        path.write_text(content)
        with pytest.raises(CalibrationError, match=r"mc\.json"):
            read_truthfulqa(path)
    for content in ("", "{", '{"question": "q"}', "[1]"):
        path.write_text(content)
        with pytest.raises(CalibrationError, match=r"mc\.json"):
            read_gsm8k(path)


def test_the_real_task_files(real_model: Callable[[str], Path]) -> None:
    data = real_model("stories260K").parents[1] / "data"
    if not data.is_dir():
        pytest.skip("../shared/data is not here")
    assert len(read_truthfulqa(data / "truthfulqa" / "mc_task.json")) == 817
    assert len(read_gsm8k(data / "gsm8k" / "test.jsonl")) == 1319
