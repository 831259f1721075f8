from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spq.calibrate import tokenize
from spq.errors import CalibrationError
from spq.evaluate import evaluate_folder, perplexity


def test_equals_transformers_loss(make_model: Callable[..., Path], text: str) -> None:
    folder = make_model()
    ids = tokenize(folder, text)
    found = evaluate_folder(folder, text, device=torch.device("cpu"), window=40)
    count = ids.numel() // 40
    windows = ids[: count * 40].view(count, 40)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(folder)(windows, labels=windows).loss
    assert found.nll == pytest.approx(float(loss), rel=1e-5)
    assert (found.num_windows, found.num_tokens, found.window, found.bos) == (count, count * 39, 40, False)
    assert f"{count} non-overlapping windows of 40 tokens, no BOS" in found.protocol


def test_uniform_logits_give_the_vocabulary() -> None:
    result = perplexity(lambda ids: torch.zeros(*ids.shape, 17), torch.arange(100) % 17, 10)
    assert result.value == pytest.approx(17.0)


def test_bos_begins_each_window_and_every_token_is_scored() -> None:
    seen: list[torch.Tensor] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return torch.zeros(*ids.shape, 100)

    result = perplexity(logits, torch.arange(1, 30), 8, bos_id=0, max_tokens=21, batch_tokens=16)
    windows = torch.cat(seen)
    assert windows[:, 0].tolist() == [0, 0, 0] and windows[:, 1:].flatten().tolist() == list(range(1, 22))
    assert result.num_tokens == 21 and [len(batch) for batch in seen] == [2, 1]


def test_windows_are_weighted_by_tokens_and_independent_of_batches() -> None:
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 50, (330,), generator=torch.Generator().manual_seed(1))
    one = perplexity(lambda batch: table[batch], ids, 10, batch_tokens=10)
    many = perplexity(lambda batch: table[batch], ids, 10, batch_tokens=1000)
    assert one.nll == pytest.approx(many.nll, rel=1e-6) and one.value == pytest.approx(math.exp(one.nll))


def test_refusals(make_model: Callable[..., Path]) -> None:
    folder = make_model(bos_token_id=None)
    cpu = torch.device("cpu")
    with pytest.raises(CalibrationError, match="3 tokens, shorter than one window of 64"):
        evaluate_folder(folder, "abc", device=cpu)
    with pytest.raises(CalibrationError, match="window of 65 tokens, but the model's context is 64"):
        evaluate_folder(folder, "abc", device=cpu, window=65)
    with pytest.raises(CalibrationError, match="no single bos_token_id"):
        evaluate_folder(folder, "abc", device=cpu, use_bos=True)
    with pytest.raises(CalibrationError, match="scores nothing"):
        perplexity(lambda ids: ids, torch.arange(9), 1)
