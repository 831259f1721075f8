from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import spq.scoring
from spq.calibrate import tokenize
from spq.errors import OptionError
from spq.evaluate import cut_windows, evaluate_folder
from spq.quality import compare, composite, measure, predict
from spq.rows import TextScore, make_row
from spq.scoring import LocalModel

CPU = torch.device("cpu")


def _noisy_copy(folder: Path, out: Path, noise: float) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    return out


def test_equals_the_definitions(
    make_model: Callable[..., Path], tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model()
    noisy = _noisy_copy(folder, tmp_path / "noisy", 0.01)
    windows = cut_windows(tokenize(folder, text), 48, max_tokens=480)
    monkeypatch.setattr(spq.scoring, "SLICE_BYTES", 4 * 260 * 7)  # slices of 7 rows, across windows
    monkeypatch.setattr(spq.scoring, "BATCH_TOKENS", 3 * 48)
    model, original = LocalModel(noisy, CPU, torch.float32), LocalModel(folder, CPU, torch.float32)
    found = compare(model, original, windows)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder)(windows).logits[:, :-1].double()
        other = AutoModelForCausalLM.from_pretrained(noisy)(windows).logits[:, :-1].double()
    p, q = functional.log_softmax(base, -1), functional.log_softmax(other, -1)
    targets = windows[:, 1:, None]
    assert found.perplexity.nll == pytest.approx(float(-q.gather(-1, targets).mean()), rel=1e-5)
    assert found.base is not None and found.base.nll == pytest.approx(float(-p.gather(-1, targets).mean()), rel=1e-5)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.top1 == float((base.argmax(-1) == other.argmax(-1)).double().mean())
    assert found.kl > 0 and 0 < found.top1 < 1  # type: ignore[operator]
    assert found.sr_ppl == pytest.approx(found.base.value / found.perplexity.value)
    assert found.sr_kl == math.exp(-found.kl) and found.sr_top1 == found.top1  # type: ignore[operator]
    assert found.perplexity.num_tokens == 470
    assert torch.equal(predict(original, windows)[1], base.argmax(-1))
    alone = measure(model, windows)
    assert alone.perplexity.nll == pytest.approx(found.perplexity.nll, rel=1e-6) and alone.sr_kl is None
    assert evaluate_folder(noisy, text, device=CPU, window=48, max_tokens=480).nll == pytest.approx(
        alone.perplexity.nll
    )


def test_a_model_against_itself_keeps_everything(make_model: Callable[..., Path], text: str) -> None:
    folder = make_model()
    model = LocalModel(folder, CPU, torch.float32)
    found = compare(model, model, cut_windows(tokenize(folder, text), 32, max_tokens=320))
    assert (found.kl, found.top1, found.sr_ppl, found.sr_kl) == (0.0, 1.0, 1.0, 1.0)


def test_a_broken_model_is_not_called_good(make_model: Callable[..., Path], tmp_path: Path, text: str) -> None:
    folder = make_model()
    broken = _noisy_copy(folder, tmp_path / "broken", math.inf)
    model, original = LocalModel(broken, CPU, torch.float32), LocalModel(folder, CPU, torch.float32)
    found = compare(model, original, cut_windows(tokenize(folder, text), 32, max_tokens=64))
    assert math.isnan(found.kl) and math.isnan(found.perplexity.nll)  # type: ignore[arg-type]
    score = TextScore.of(found)
    assert TextScore.model_validate_json(score.model_dump_json()).model_dump_json() == score.model_dump_json()


def test_another_vocabulary_is_refused(make_model: Callable[..., Path], text: str) -> None:
    folder = make_model()
    other = make_model("mistral", vocab_size=300)
    windows = cut_windows(tokenize(folder, text), 32, max_tokens=64)
    with pytest.raises(OptionError, match="not the same model"):
        compare(LocalModel(other, CPU, torch.float32), LocalModel(folder, CPU, torch.float32), windows)


def test_composite_by_hand() -> None:
    assert composite(1.0, 0.0, 16.0) == 0.0  # nothing was compressed
    assert composite(1.0, 0.25, 4.0) == pytest.approx((0.5 + 0.5) / 2)
    assert composite(0.5, 0.0, 8.0) == pytest.approx(0.5 * 0.25 / 2)
    assert composite(1.0, -0.3, 32.0) == 0.0
    assert make_row("server", None, {}).composite is None
