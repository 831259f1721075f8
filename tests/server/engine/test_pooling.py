"""Sums of prompts' last hidden states equal transformers', however prompts are cut, shared and preempted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Harness, drive
from models import random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pooled")
    random_model("llama").save_pretrained(path)
    return path


def expected(prompts: list[list[int]]) -> list[torch.Tensor]:
    model = random_model("llama").model
    with torch.no_grad():
        return [model(torch.tensor([ids])).last_hidden_state[0].sum(0) for ids in prompts]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    begin = torch.randint(3, 263, (20,), generator=generator).tolist()
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [begin + torch.randint(3, 263, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("max_batch_tokens", [17, 48, 512])
def test_sums_equal_transformers_whatever_the_chunks(folder: Path, max_batch_tokens: int) -> None:
    texts = [*prompts(5), [7]]
    harness = Harness(folder, max_batch_tokens=max_batch_tokens, backend="reference")
    sequences = [harness.sequence(ids, f"s{i}", max_tokens=0, pools=True) for i, ids in enumerate(texts)]
    harness.run(sequences)
    for sequence, total in zip(sequences, expected(texts), strict=True):
        assert sequence.states.num_tokens == len(sequence.token_ids) == sequence.num_prompt_tokens
        torch.testing.assert_close(torch.tensor(sequence.states.total), total, atol=2e-4, rtol=2e-4)


def test_beside_sequences_that_generate_and_under_preemption(folder: Path) -> None:
    texts = prompts(6, seed=1)
    harness = Harness(folder, max_batch_tokens=17, num_blocks=16, block_size=8, admission_reserve=0.0)
    pooled = [harness.sequence(ids, f"p{i}", max_tokens=0, pools=True) for i, ids in enumerate(texts)]
    others = [harness.sequence(ids, f"g{i}", max_tokens=30) for i, ids in enumerate(prompts(4, seed=2))]
    outputs = drive(harness.scheduler, harness.runner, [x for pair in zip(others, pooled) for x in pair] + pooled[4:])  # noqa: B905
    assert harness.scheduler.num_preemptions > 0
    assert sum(o.request_id.startswith("p") for o in outputs) == 6, "one event each, the end"
    for sequence, total in zip(pooled, expected(texts), strict=True):
        torch.testing.assert_close(torch.tensor(sequence.states.total), total, atol=2e-3, rtol=2e-3)
