"""Greedy answers equal those of transformers on the same weights, for every family, alone and in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Harness
from models import FAMILIES, SMALL, random_model, real_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

NEW_TOKENS = 40
TEXTS = (
    "Once upon a time",
    "The little dog",
    "Lily and Ben went to the park. They saw a big tree and",
    "One morning the old man said that nothing in the world could make him",
)


def expected(model: PreTrainedModel, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
    """transformers' greedy continuation, never stopped early."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    return out[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_generate_what_transformers_does(family: str, tmp_path: Path) -> None:
    # 96 trained positions for dynamic: the longest prompt crosses them while generating
    model = random_model(family, **({"max_position_embeddings": 96} if family == "llama-dynamic" else {}))
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, SMALL["vocab_size"], (n,), generator=generator).tolist() for n in (5, 1, 40, 70)]
    harness = Harness(tmp_path)
    sequences = harness.run([harness.sequence(p, str(i), max_tokens=NEW_TOKENS) for i, p in enumerate(prompts)])
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.token_ids == expected(model, prompt)


@pytest.mark.parametrize("name", ["demo", "stories260K", "babyllama-1m"])
def test_trained_models_generate_what_transformers_does(name: str) -> None:
    folder = real_model(name)
    if folder is None:
        pytest.skip(f"{name} is not on this machine")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    harness = Harness(folder)
    sequences = harness.run([harness.sequence(p, str(i), max_tokens=96) for i, p in enumerate(prompts)])
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.token_ids == expected(model, prompt, 96)


def test_prompt_logprobs_are_those_of_transformers(tmp_path: Path) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    prompt = torch.randint(3, SMALL["vocab_size"], (61,), generator=torch.Generator().manual_seed(5)).tolist()
    harness = Harness(tmp_path, max_batch_tokens=17)  # several chunks
    [sequence] = harness.run([harness.sequence(prompt, max_tokens=0, prompt_logprobs=3)])
    with torch.inference_mode():
        scores = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    assert sequence.num_output_tokens == 0
    assert len(sequence.prompt_logprobs) == len(prompt) - 1
    for position, entry in enumerate(sequence.prompt_logprobs):
        row = scores[position]
        # float32 logits of both sides differ by rounding alone: 3 layers, sums of at most 88 terms
        assert abs(entry.logprob - row[prompt[position + 1]].item()) < 1e-4
        assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()
        assert entry.rank == int((row > row[prompt[position + 1]]).sum()) + 1
