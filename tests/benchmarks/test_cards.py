"""The tables of cards: shapes against published counts, GPTQ's bytes against files, the page against the program."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from benchmarks.cards import (
    CARDS_GIB,
    DEFAULT,
    FORMS,
    GIB,
    GPTQ8,
    INT4,
    gptq_bytes,
    known_specs,
    kv_tokens,
    main,
    shown_tokens,
    smallest_card,
    tables,
)
from server.engine.memory import MIN_CONTEXT
from spq.architecture import spec_of
from spq.layout import num_parameters

ROOT = Path(__file__).resolve().parents[2]
CARDS = [n * GIB for n in CARDS_GIB]
PUBLISHED = {  # parameters, as the hub counts them in the safetensors files
    "TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-2-7b-hf": 6_738_415_616,
    "Meta-Llama-3-8B": 8_030_261_248,
    "Llama-2-13b-hf": 13_015_864_320,
    "Llama-2-70b-hf": 68_976_648_192,
    "Meta-Llama-3-70B": 70_553_706_496,
}


def test_the_shapes_have_the_published_parameters() -> None:
    assert {name: num_parameters(spec) for name, spec in known_specs().items()} == PUBLISHED


def test_gptq_is_counted_as_its_files_are() -> None:
    """GPTQModel 7.7.0 made 94 MB and 136 MB of the random 110 M model."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=768, intermediate_size=2048,
        num_hidden_layers=12, num_attention_heads=12, tie_word_embeddings=True,
    )  # fmt: skip
    spec = spec_of(config)
    assert gptq_bytes(spec, 4) == pytest.approx(94e6, rel=6e-3)
    assert gptq_bytes(spec, 8) == pytest.approx(136e6, rel=6e-3)


def test_gptq_of_7b_is_what_the_paper_reports() -> None:
    assert GPTQ8.nbytes(known_specs()["Llama-2-7b-hf"]) == pytest.approx(7.16e9, rel=2e-3)


def test_tokens_fill_the_card_and_no_more() -> None:
    spec = known_specs()["Llama-2-7b-hf"]
    weights = DEFAULT.nbytes(spec)
    found = kv_tokens(spec, weights, 12 * GIB, 1)
    assert found > 4096
    assert weights + found * spec.kv_token_bytes(1) < 12 * GIB * 0.98
    assert kv_tokens(spec, weights, 6 * GIB, 1) == 0
    token = spec.kv_token_bytes(1)
    least = next(n for n in range(6 * GIB, 12 * GIB, token) if kv_tokens(spec, weights, n, 1))
    assert kv_tokens(spec, weights, least, 1) == pytest.approx(MIN_CONTEXT, abs=1)


def test_smaller_weights_never_need_a_larger_card() -> None:
    for name, spec in known_specs().items():
        sizes = [form.nbytes(spec) for form in FORMS]
        assert sizes == sorted(sizes, reverse=True), name
        by_form = [smallest_card(spec, form, CARDS) or 1 << 60 for form in FORMS]
        assert by_form[FORMS.index(INT4)] == min(by_form), name


@pytest.mark.parametrize(
    ("count", "text"), [(0, "-"), (256, "256"), (1000, "1.0k"), (9949, "9.9k"), (45_300, "45k"), (1_240_000, "1.2M")]
)
def test_tokens_are_shown_short(count: int, text: str) -> None:
    assert shown_tokens(count) == text


def test_the_page_shows_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == tables(known_specs(), CARDS)
    assert printed in (ROOT / "docs" / "deploy.md").read_text("utf-8"), "run python -m benchmarks.cards and paste it"


def test_other_models_and_cards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "mine")
    assert main([str(tmp_path / "mine"), "--cards", "11GiB"]) == 0
    text = capsys.readouterr().out
    assert "mine | 6.74 G |" in text and "| model | 11 |" in text
    assert main([str(tmp_path / "none")]) == 2
    assert main(["--cards", "large"]) == 2
    assert "'large' is not a size" in capsys.readouterr().err
