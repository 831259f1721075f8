from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spq.config import SPQConfig
from spq.judge import Judge
from spq.results import find_cases, main
from spq.results_page import ensemble, page, predictions, table
from spq.rows import Row, TextScore, read_rows, write_rows
from spq.texts import EvaluationText
from spq.trials import AT, TRAINED, Trials
from spq.variants import (
    DEFAULT,
    FLOAT16,
    INT8,
    RECOVERED,
    Family,
    Setting,
    budget_name,
    parts,
    recovered,
    search,
    variants,
)
from spq.verdict import UNKNOWN, against_gptq, difference, reason
from tests.spq.test_gptq import make_checkpoint

SETTING = Setting(window=32, group=16)


def row(name: str, kib: float, perplexity: float, **options: float) -> Row:
    score = TextScore(perplexity=perplexity, nll=0.0, num_tokens=1, protocol="p", top1=0.9, kl=0.1)
    nbytes = int(1024 * kib)
    return Row(name=name, file_bytes=nbytes, resident_bytes=nbytes, texts={"t": score}, options=dict(options))


def named(*rows: Row) -> dict[str, Row]:
    return {found.name: found for found in rows}


def test_gptq_is_compared_both_ways() -> None:
    assert "needs GPTQModel" in against_gptq(named(row(FLOAT16, 100, 10.0)))
    rival = row("GPTQ 4 bits", 40, 10.5)
    ours = f"SPQ budgeted{AT}{rival.name}"
    text = against_gptq(named(rival, row(ours, 40, 10.4), row(budget_name(5), 30, 10.5), row(budget_name(4), 25, 11)))
    assert (
        "40.0 to 40.0 KiB): at least as good on t (10.400 to 10.500, KL" in text and "takes 75.0% of its bytes" in text
    )
    text = against_gptq(named(rival, row(ours, 40, 10.6)))
    assert "**worse** on t (10.600 to 10.500," in text and "No measured budget reaches" in text


def test_a_difference_has_its_error() -> None:
    def scored(*nll: float) -> TextScore:
        mean = sum(nll) / len(nll)
        return TextScore(perplexity=math.exp(mean), nll=mean, num_tokens=9, protocol="p", kl=0.1, by_window=nll)

    percent, error = difference(scored(2.1, 2.3, 2.2, 2.6), scored(2.0, 2.2, 2.1, 2.5))
    assert percent == pytest.approx(100 * (math.exp(0.1) - 1)) and error == pytest.approx(0, abs=1e-9)
    percent, error = difference(scored(2.0, 2.4), scored(2.1, 2.2))
    assert percent == pytest.approx(100 * (math.exp(0.05) - 1))
    assert error == pytest.approx(100 * 0.15 * math.exp(0.05))  # pairs differ by -0.1 and 0.2: 0.212 / sqrt(2)
    rival, ours = row("GPTQ 4 bits", 40, 10.5), row(f"SPQ budgeted{AT}GPTQ 4 bits", 40, 10.5)
    theirs, near, far = scored(2.0, 2.2, 2.1, 2.5), scored(2.1, 2.2, 2.0, 2.51), scored(2.2, 2.41, 2.3, 2.69)
    for mine, word in ((near, "not told apart on t"), (far, "**worse** on t")):
        rows = named(rival.model_copy(update={"texts": {"t": theirs}}), ours.model_copy(update={"texts": {"t": mine}}))
        assert word in against_gptq(rows) and ("Why it is worse is not known" in against_gptq(rows)) == (mine is far)


def test_a_reason_is_given_only_where_the_figures_show_it() -> None:
    def both(name: str, first: float, second: float) -> Row:
        scores = {"a": row(name, 1, 10.0).texts["t"], "b": row(name, 1, 10.0).texts["t"]}
        kls = {"a": first, "b": second}
        return Row(name=name, texts={t: score.model_copy(update={"kl": kls[t]}) for t, score in scores.items()})

    rival = both("GPTQ", 0.02, 0.05)
    assert reason(both("ours", 0.01, 0.07), rival, 1).startswith("Where it is worse on the second text")
    assert reason(both("ours", 0.01, 0.02), rival, 1) == reason(both("ours", 0.01, 0.07), rival, 0) == UNKNOWN


@pytest.mark.parametrize(
    ("svd", "pruning", "word"),
    [(11.0, 12.0, "**confirmed**"), (9.0, 9.5, "is **refuted**"), (9.0, 12.0, "**refuted in part**")],
)
def test_the_ablation_is_judged(svd: float, pruning: float, word: str) -> None:
    parts_of = [row(f"SVD {i}{AT}{DEFAULT}", 50, svd) for i in range(3)]
    parts_of += [row(f"pruning {i}{AT}{DEFAULT}", 50, pruning) for i in range(3)]
    text = ensemble(named(row(DEFAULT, 50, 10.0), row(INT8, 51, 9.9), *parts_of))
    assert word in text and "int8 alone, +2.0% bytes: 9.900" in text
    assert len(parts(SETTING)) == len(parts_of)
    assert ensemble(named(row(DEFAULT, 50, 10.0), parts_of[0])).endswith("Not all parts are measured: no verdict.")
    too_large = ensemble(named(row(DEFAULT, 50, 10.0), row(f"SVD, float{AT}{DEFAULT}", 80, 9.0)))
    assert "cannot be made so small (+60% at its smallest" in too_large


def test_predictions_off_by_more_than_5_percent_are_named() -> None:
    base = row(FLOAT16, 100, 10.0)
    near = row(budget_name(6), 40, 10.2, rise=0.02, predicted=10.2, measured=10.2)
    far = row(budget_name(4), 30, 12.0, rise=0.05, predicted=10.5, measured=11.9, weak=True)
    ignored = row(budget_name(3), 20, 90.0, rise=0.1)
    assert "The 1 measured of the budgets of 8 to 4 bits are within 5 %" in predictions(named(base, near, ignored))
    text = predictions(named(base, near, far))
    assert "**Off by more than 5 %** at: 4 bits, said to be weak by the tool." in text


def test_the_table_is_sorted_and_names_what_is_missing() -> None:
    rows = [row("small", 10, 9.0), row("large", 20, 8.0), Row(name="never", options={"why_not": "too small"})]
    lines = table(rows)
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["large", "small"]
    assert lines[-1] == "never: too small."


def test_the_search_ends_at_or_below_the_bytes() -> None:
    family = Family("f", lambda dial: SPQConfig(), 0.0, 1.0)
    for target in (250, 600, 999):
        dial = search(lambda x: int(1000 * (1 - x)), family, target)
        assert 0.98 * target - 5 <= int(1000 * (1 - dial)) <= target
    assert search(lambda x: 2000, family, 500) == 1.0


def trials(source: Path, text: str, tmp_path: Path) -> Trials:
    texts = [EvaluationText("a", text[:400]), EvaluationText("b", text[400:900])]
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return Trials(
        source, texts, text, SETTING, tmp_path / "scratch", tmp_path / "rows.jsonl", None, 1, False, lambda name: None
    )


def test_rows_are_measured_and_gone_on_from(make_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    source = make_model(tied=True)
    make_checkpoint(source, tmp_path / "gptq", 4)
    measured = (FLOAT16, INT8, DEFAULT, budget_name(3), "double compression, alpha 0.5")
    searched = [f"{family.name}{AT}{DEFAULT}" for family in parts(SETTING)]
    skipped = [name for name in (*variants(SETTING), *searched[1:]) if name not in measured]
    # each 100 steps of training; `test_recover` has training
    skipped += [*recovered(SETTING), f"SPQ budgeted{AT}GPTQ 4 bits, int8 embedding{RECOVERED}"]
    write_rows([Row(name=name) for name in skipped], tmp_path / "rows.jsonl")
    (tmp_path / f"gptq{TRAINED}").symlink_to(tmp_path / "gptq")
    trials(source, text, tmp_path).run([tmp_path / "gptq", tmp_path / "absent", tmp_path / f"gptq{TRAINED}"])
    rows = {found.name: found for found in read_rows(tmp_path / "rows.jsonl")}
    assert all(not rows[name].texts for name in skipped)
    base, int8 = rows[FLOAT16], rows[INT8]
    assert base.texts["a"].top1 == 1.0 and base.texts["b"].kl == 0.0
    assert 0.4 < (int8.file_bytes or 0) / (base.file_bytes or 1) < 0.75
    assert rows[budget_name(3)].texts and (rows[budget_name(3)].options["rise"] or 0) > 0
    coded = rows["double compression, alpha 0.5"]
    assert (coded.file_bytes or 0) > 0 and coded.texts["a"].perplexity > 1
    for name in ("GPTQ 4 bits", "GPTQ 4 bits, int8 embedding", DEFAULT):
        ours = rows[f"SPQ budgeted{AT}{name}"]
        assert not ours.texts or 0.8 < (ours.file_bytes or 0) / (rows[name].file_bytes or 1) <= 1
    assert rows[f"GPTQ 4 bits{RECOVERED}"].texts["a"] == rows["GPTQ 4 bits"].texts["a"]
    shown = page([("m", "t", SETTING, list(rows.values()))], {"threads": 1})
    first, second = shown.split("With LoRA recovery")
    assert f"GPTQ 4 bits{RECOVERED}" not in first and INT8 not in second
    assert second.count("| GPTQ 4 bits") == 4
    before = (tmp_path / "rows.jsonl").read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    second = trials(source, text, tmp_path)
    second.scratch = again
    second.run([tmp_path / "gptq"])
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    second._variant("never", SETTING.budget(100), Judge([], torch.device("cpu"), torch.float32))
    assert "below the smallest" in str(read_rows(tmp_path / "rows.jsonl")[-1].options["why_not"])


def test_texts_share_nothing_with_calibration(tmp_path: Path) -> None:
    (tmp_path / "stories260K").mkdir()
    (tmp_path / "t").write_text("".join(f"story {i}\n<|endoftext|>\n" for i in range(100)))
    (case,) = find_cases(tmp_path, tmp_path / "t", None, EvaluationText("second", "x"))
    assert [found.name for found in case.texts] == ["TinyStories", "second"]
    assert not set(case.calibration.splitlines()) & set(case.texts[0].text.splitlines())


def test_nothing_to_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("one\ntwo\nthree\n")
    arguments = ["--models", str(tmp_path), "--stories", str(tmp_path / "t"), "--rows", str(tmp_path / "rows")]
    assert main(arguments) == 2
    assert "no model with a text" in capsys.readouterr().err
