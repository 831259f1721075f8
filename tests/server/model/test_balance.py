"""Evening out the keys: scores stay bit for bit, and outliers no longer cost an int8 cache its steps."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import Harness
from models import SMALL, random_model

from kernels.ops import BackendName, Norm
from kernels.weights import (
    CorrectedWeight,
    DenseWeight,
    Int4Weight,
    Int8Weight,
    LinearWeight,
    LowRankWeight,
    pack_int4,
)
from server.model import load
from server.model.balance import MAX_EXPONENT, balance_norms, balance_projections
from spq.compress import compress
from spq.config import SPQConfig

HEAD, INNER = 8, 24
IDS = torch.randint(3, SMALL["vocab_size"], (60,), generator=torch.Generator().manual_seed(1)).tolist()


def served_logits(folder: Path, ids: list[int], backend: BackendName, **options: object) -> torch.Tensor:
    """Logits [T, vocab] of the server's model, prefilled in chunks."""
    harness = Harness(folder, backend=backend, max_batch_tokens=23, **options)  # type: ignore[arg-type]
    rows: list[torch.Tensor] = []
    original = harness.model.forward

    def forward(*arguments: object) -> torch.Tensor:
        hidden = original(*arguments)  # type: ignore[arg-type]
        rows.append(harness.model.logits(hidden))
        return hidden

    harness.model.forward = forward  # type: ignore[method-assign]
    harness.run([harness.sequence(ids, max_tokens=0)])
    return torch.cat(rows)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def as_stored() -> mock._patch_dict:  # type: ignore[name-defined]
    return mock.patch.multiple(
        load, balance_projections=lambda q, k, head_dim: (q, k), balance_norms=lambda q, k: (q, k)
    )


def with_outliers(folder: Path, family: str, factor: float, head_dim: int) -> None:
    """A random model whose keys have one large rotary pair per head; the function does not change."""
    model = random_model(family)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            pair = [head_dim // 2 - 1, head_dim - 1]
            if family == "qwen3":
                attention.k_norm.weight[pair] *= factor
                attention.q_norm.weight[pair] /= factor
                continue
            for projection, scale in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
                projection.weight.view(-1, head_dim, projection.in_features)[:, pair] *= scale
                if projection.bias is not None:
                    projection.bias.view(-1, head_dim)[:, pair] *= scale
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_with_a_float_cache_nothing_changes(family: str, backend: BackendName, tmp_path: Path) -> None:
    with_outliers(tmp_path, family, 20.0, 16 if family == "qwen3" else 12)
    balanced = served_logits(tmp_path, IDS, backend)
    with as_stored():
        assert torch.equal(served_logits(tmp_path, IDS, backend), balanced)


@pytest.mark.parametrize("preset", ["int8", "default"])
def test_packed_weights_are_balanced_too(preset: str, tmp_path: Path) -> None:
    with_outliers(tmp_path / "source", "llama", 16.0, 12)
    options = {"variance_threshold": 0.7, "min_saving": 0.0, "rank_multiple": 1} if preset == "default" else {}
    packed = tmp_path / "packed"
    config = SPQConfig.preset(preset, max_prune_ratio=0.0, **options)
    compress(tmp_path / "source", packed, config, calibration_text="", device=torch.device("cpu"))
    exact = served_logits(packed, IDS, "reference")
    balanced = served_logits(packed, IDS, "reference", kv_dtype=torch.int8)
    with as_stored():
        assert torch.equal(served_logits(packed, IDS, "reference"), exact)
        stored = served_logits(packed, IDS, "reference", kv_dtype=torch.int8)
    # 16 times larger outliers leave the other channels a sixteenth of the steps
    assert error(balanced, exact.double()) < 0.25 * error(stored, exact.double())


@pytest.mark.parametrize("family", ["llama", "llama-bias", "qwen3"])
def test_outliers_cost_an_int8_cache_nothing(family: str, tmp_path: Path) -> None:
    head_dim = 16 if family == "qwen3" else 12
    errors = []
    for factor in (1.0, 64.0):
        folder = tmp_path / str(factor)
        with_outliers(folder, family, factor, head_dim)
        exact = served_logits(folder, IDS, "reference").double()
        errors.append(error(served_logits(folder, IDS, "reference", kv_dtype=torch.int8), exact))
    assert errors[1] < 1.5 * errors[0]


def test_every_kind_of_weight_keeps_its_scores() -> None:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def int8(out: int, inner: int, bias: bool) -> Int8Weight:
        q = torch.randint(1, 128, (out, inner), generator=generator, dtype=torch.int8)
        return Int8Weight(q, normal(out).exp(), normal(out) if bias else None)

    def pair(out: int) -> LowRankWeight:
        return LowRankWeight(int8(5, INNER, False), DenseWeight(normal(out, 5), normal(out)))

    def int4(out: int, inner: int, bias: bool, zeros: bool = False) -> Int4Weight:
        """Never the zero point, so that no weight is 0."""
        q = torch.randint(9, 16, (out, inner), generator=generator, dtype=torch.uint8)
        groups = -(-inner // 10)
        zero = torch.randint(0, 9, (out, groups), generator=generator, dtype=torch.uint8) if zeros else None
        scale = normal(out, groups).exp().half()
        return Int4Weight(pack_int4(q), scale, zero, 10, inner, normal(out) if bias else None)

    def corrected(main: DenseWeight | Int8Weight | Int4Weight) -> CorrectedWeight:
        return CorrectedWeight(main, LowRankWeight(int8(3, INNER, False), int4(main.shape[0], 3, False)))

    rows = (torch.arange(2 * HEAD) % 4 - 2).float().exp()[:, None]
    cases: list[tuple[LinearWeight, LinearWeight]] = [
        (DenseWeight(normal(4 * HEAD, INNER)), DenseWeight(normal(2 * HEAD, INNER) * rows)),
        (DenseWeight(normal(4 * HEAD, INNER).bfloat16()), int8(2 * HEAD, INNER, True)),
        (pair(4 * HEAD), pair(2 * HEAD)),
        (int4(4 * HEAD, INNER, False), int4(2 * HEAD, INNER, True, zeros=True)),
        (corrected(int4(4 * HEAD, INNER, True)), corrected(int8(2 * HEAD, INNER, True))),
        (
            LowRankWeight(int4(5, INNER, False), int4(4 * HEAD, 5, True)),
            LowRankWeight(int8(5, INNER, False), int4(2 * HEAD, 5, False, zeros=True)),
        ),
    ]
    for q, k in cases:
        even_q, even_k = balance_projections(q, k, HEAD)
        assert type(even_q) is type(q)
        assert type(even_k) is type(k)
        shift_k = even_k.dequantize() / k.dequantize()
        factors = shift_k[:, 0].view(2, HEAD)
        assert (shift_k == factors.view(-1, 1)).all()
        assert (factors.log2() % 1 == 0).all()  # powers of two
        assert torch.equal(factors[:, : HEAD // 2], factors[:, HEAD // 2 :])  # one for both of a rotary pair
        up = even_q.dequantize() / q.dequantize()
        assert torch.equal(up[:, 0].view(2, 2, HEAD), (1 / factors)[:, None].expand(2, 2, HEAD))
        for even, stored, factor in ((even_k, k, factors.flatten()), (even_q, q, up[:, 0])):
            if stored.bias is not None:
                assert even.bias is not None
                assert torch.equal(even.bias, stored.bias * factor)


def test_half_precision_scales_may_leave_their_range() -> None:
    """A float16 scale near its largest, times 2^8, would be infinite."""
    q = torch.full((HEAD, INNER), 15, dtype=torch.uint8)
    scale = torch.full((HEAD, 1), 2.0**-14).half()
    scale[0] = 60_000.0
    k = Int4Weight(pack_int4(q), scale, None, INNER, INNER)
    even_q, even_k = balance_projections(k, k, HEAD)
    scores = even_q.dequantize() * even_k.dequantize()
    assert even_q.dequantize().isfinite().all()
    assert torch.equal(scores, k.dequantize() * k.dequantize())
    assert even_q.dequantize().max() > 1e6


def test_channels_of_nothing_stay_finite() -> None:
    dead = DenseWeight(torch.zeros(HEAD, INNER))
    for weight in balance_projections(dead, dead, HEAD):
        assert torch.equal(weight.dequantize(), dead.weight)
    lonely = torch.zeros(HEAD)
    lonely[0] = 5.0
    q, k = balance_norms(Norm(torch.ones(HEAD), 1e-6), Norm(lonely, 1e-6))
    assert torch.equal(q.weight * k.weight, lonely)
    assert q.weight.max() <= 2.0**MAX_EXPONENT


def test_a_model_with_balanced_keys_answers_with_an_int8_cache(tmp_path: Path) -> None:
    with_outliers(tmp_path, "llama", 30.0, 12)
    harness, exact = Harness(tmp_path, kv_dtype=torch.int8), Harness(tmp_path)
    [found] = harness.run([harness.sequence(IDS, max_tokens=8)])
    assert found.token_ids == exact.run([exact.sequence(IDS, max_tokens=8)])[0].token_ids
