from __future__ import annotations

import numpy as np
import pytest
import torch

import spq.quantize
from spq.quantize import GranularityRule, quantize, quantize_streamed


def naive(weight: torch.Tensor, per_channel: bool) -> tuple[np.ndarray, list[float]]:
    """The published formulas as loops in float32: scale = max|W| / 127 with its floors, round half to even."""
    rows = weight.numpy()
    top = max(float(np.abs(rows).max()), 5e-7)
    out, scales = np.zeros(rows.shape, np.int8), []
    for i, row in enumerate(rows):
        scale = max(np.float32(np.abs(row).max()) / np.float32(127), np.float32(1e-6))
        if not per_channel:
            scale = np.float32(top) / np.float32(127)
        scales.append(float(scale))
        for j, value in enumerate(row):
            out[i, j] = max(-127, min(127, round(float(np.float32(value) / np.float32(scale)))))
    return out, scales


@pytest.mark.parametrize("per_channel", [True, False])
def test_equals_the_loop(per_channel: bool) -> None:
    weight = torch.randn(9, 31, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 9)[:, None]
    weight[4] = 0.0  # a dead row
    weight[5, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # halves: scale 1, ties to even
    weight[5, 4:] = 0.0
    packed = quantize(weight, per_channel)
    expected, scales = naive(weight, per_channel)
    assert np.array_equal(packed.qweight.numpy(), expected)
    torch.testing.assert_close(packed.scale, torch.tensor(scales), rtol=0, atol=0)
    if per_channel:
        assert packed.qweight[5, :4].tolist() == [127, 0, 2, -2]
    assert packed.scale.dtype == torch.float32 and packed.qweight.dtype == torch.int8


@pytest.mark.parametrize("per_channel", [True, False])
def test_error_is_at_most_half_a_step(per_channel: bool) -> None:
    weight = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    packed = quantize(weight, per_channel)
    step = packed.scale[:, None]
    assert ((packed.dequantize() - weight).abs() <= step * 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize("per_channel", [True, False])
def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch, per_channel: bool) -> None:
    weight = torch.randn(23, 7, generator=torch.Generator().manual_seed(2)).half()
    whole = quantize(weight, per_channel)
    monkeypatch.setattr(spq.quantize, "CHUNK_ELEMENTS", 30)
    spans: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        spans.append((start, stop))
        return weight[start:stop]

    pieces = quantize_streamed(rows, weight.shape, per_channel)
    assert max(stop - start for start, stop in spans) == 4
    assert torch.equal(whole.qweight, pieces.qweight) and torch.equal(whole.scale, pieces.scale)


def test_mix_name() -> None:
    rule = GranularityRule.over("mix_name", [1])
    layer = "model.layers.0"
    assert rule.per_channel(f"{layer}.mlp.down_proj", (8, 8))
    assert not rule.per_channel(f"{layer}.self_attn.q_proj", (8192, 8192))
    assert not rule.per_channel(f"{layer}.self_attn.k_proj.down", (64, 8192))
    assert not rule.per_channel("lm_head", (32000, 4096))
    assert rule.per_channel("other", (1024, 2)) and rule.per_channel("other", (1000, 1001))
    assert not rule.per_channel("other", (1000, 1000))  # not above a million


def test_thresholds_over_all_outputs() -> None:
    sizes = [4096, 4096, 4096, 11008, 11008, 4096, 32000, 900]
    percentile = GranularityRule.over("mix_percentile", sizes)
    assert percentile.threshold == np.percentile(sizes, 50)
    assert percentile.per_channel("x", (4096, 1)) and not percentile.per_channel("x.down", (900, 1))
    spread = GranularityRule.over("mix_meanstd", sizes)
    assert spread.threshold == pytest.approx(np.mean(sizes) + 0.5 * np.std(sizes))
    assert spread.per_channel("x", (32000, 1)) and not spread.per_channel("x", (11008, 1))


def test_all_or_nothing() -> None:
    assert GranularityRule.over("channel", [9]).per_channel("lm_head", (1, 1))
    assert not GranularityRule.over("tensor", [9]).per_channel("mlp.up_proj", (99999, 9))
