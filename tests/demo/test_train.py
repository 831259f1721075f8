"""demo/train.py learns, scores as it says, and leaves a folder that transformers and the demo's claims agree with."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

DEMO = Path(__file__).resolve().parents[2] / "demo"
TEXT = "The old house stood on the hill, and nobody had lived in it since the winter.\n\n" * 40


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_train", DEMO / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_train"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def test_three_steps_leave_a_loadable_folder(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text(TEXT + "<|endofbook|>\n" + TEXT)
    (tmp_path / "valid.txt").write_text(TEXT)
    out = tmp_path / "model"
    tiny = "--vocab 300 --dim 32 --layers 2 --heads 4 --kv-heads 2 --ffn 64 --context 16 --batch 4 --steps 3 --warmup 1"
    files = ["--train", str(tmp_path / "train.txt"), "--valid", str(tmp_path / "valid.txt"), "--out", str(out)]
    script.main([*files, "--device", "cpu", *tiny.split()])

    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["steps"] == 3 and report["tokens"] == 3 * 4 * 16
    assert report["perplexity"] == pytest.approx(math.exp(report["held_out_nats"]))
    assert report["held_out_nats"] < math.log(300)  # better than chance: it learnt something
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.float16
    assert tokenizer("The hill")["input_ids"][0] == model.config.bos_token_id == 0
    assert tokenizer.decode(tokenizer("The hill")["input_ids"], skip_special_tokens=True) == "The hill"
    turns = [{"role": "user", "content": " Once "}, {"role": "assistant", "content": "upon"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|bos|>Once\n\nupon\n\n"


def test_training_lowers_the_loss_and_repeats_itself(script: ModuleType) -> None:
    recipe = script.Recipe(
        vocab=16,
        dim=16,
        layers=1,
        heads=2,
        kv_heads=1,
        ffn=32,
        context=8,
        batch=8,
        steps=60,
        warmup=4,
        learning_rate=0.03,
    )
    stream = torch.arange(16, dtype=torch.int32).repeat(20)  # each token tells the next
    losses = []
    for _ in range(2):
        model = script.build_model(recipe)
        before = script.evaluate(model, stream, recipe.context)
        script.fit(model, stream, stream, recipe, compiled=False)
        losses.append(script.evaluate(model, stream, recipe.context))
    assert before == pytest.approx(math.log(16), rel=0.05)
    assert losses[0] < 0.5 * before
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_evaluate_is_the_mean_over_scored_tokens(script: ModuleType) -> None:
    recipe = script.Recipe(vocab=16, dim=16, layers=1, heads=2, kv_heads=1, ffn=32)
    model = script.build_model(recipe)
    stream = torch.randint(0, 16, (8 * 5 + 3,), generator=torch.Generator().manual_seed(3)).int()
    total = 0.0
    for row in stream[:40].view(5, 8).long():  # the last 3 tokens fill no window
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=row[None]).logits[0].float()
        total -= logits[:-1].log_softmax(-1).gather(1, row[1:, None]).sum().item()
    # bfloat16 rounds the logits by at most 2**-8 of their size, which is below 1 for random weights
    assert script.evaluate(model, stream, 8, batch=2) == pytest.approx(total / 35, abs=2**-8)
    assert script.evaluate(model, stream, 8, limit=2) != script.evaluate(model, stream, 8)


def test_schedule_warms_up_and_ends_at_the_floor(script: ModuleType) -> None:
    recipe = script.Recipe(steps=1000)
    rates = [script.learning_rate(step, recipe) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(recipe.learning_rate / recipe.warmup)
    assert max(rates) <= recipe.learning_rate
    assert rates.index(max(rates)) == recipe.warmup - 1
    assert rates[-1] == pytest.approx(recipe.floor * recipe.learning_rate, rel=1e-3)


def test_short_texts_are_refused_with_the_numbers(script: ModuleType) -> None:
    recipe = script.Recipe(vocab=16, dim=16, layers=1, heads=2, kv_heads=1, ffn=32, context=8)
    model = script.build_model(recipe)
    few = torch.zeros(7, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"7 tokens .* 8"):
        script.fit(model, few, few, recipe, compiled=False)
    with pytest.raises(ValueError, match=r"7 held-out .* 8"):
        script.evaluate(model, few, 8)


def test_defaults_are_the_bundled_model(script: ModuleType) -> None:
    recipe, config = script.Recipe(), AutoModelForCausalLM.from_pretrained(DEMO / "storyteller").config
    made = script.build_model(recipe).config
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
        assert getattr(made, name) == getattr(config, name), name
    template = (DEMO / "storyteller" / "chat_template.jinja").read_text()
    assert template == script.CHAT_TEMPLATE


def test_bundled_model_writes_english() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "storyteller", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "storyteller")
    text = "It was a cold night, and the old man sat by the fire. He said that he would go to the"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss.item()
    # far below a uniform guess (log 4096 = 8.3 nats) and below the held-out books' mean of 3.94
    assert nats < 3.9
