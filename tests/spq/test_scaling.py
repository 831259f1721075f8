from __future__ import annotations

import pytest
import torch

from kernels.weights import Int4Weight, Int8Weight, pack_int4
from spq.entropy import encode, entropy_bits
from spq.quantize import quantize
from spq.scaling import channel_scales, coded_bytes, fold, prune_integers


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_scales_follow_the_formula() -> None:
    top = torch.tensor([1.0, 4.0, 16.0, 0.0])
    assert torch.equal(channel_scales(top, 0.0), torch.ones(4))
    assert torch.allclose(channel_scales(top, 1.0), torch.tensor([0.25, 1.0, 4.0, 1.0]))
    assert torch.allclose(channel_scales(top, 0.5), torch.tensor([0.5, 1.0, 2.0, 1.0]))
    assert torch.equal(channel_scales(torch.zeros(3), 1.0), torch.ones(3))
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="finite and not negative"):
            channel_scales(torch.tensor([1.0, bad]), 0.5)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_float_model_stays_the_same(generator: torch.Generator, alpha: float) -> None:
    x = torch.randn(20, 64, generator=generator) * torch.logspace(-1, 2, 64)
    norm, weights = torch.rand(64, generator=generator) + 0.5, [torch.randn(n, 64, generator=generator) for n in (8, 5)]
    scales = channel_scales((x * norm).abs().amax(0), alpha)
    new_norm, new_weights = fold(norm, weights, scales)
    assert scales.max() > 3 and not torch.equal(new_norm, norm)
    for old, new in zip(weights, new_weights, strict=True):
        exact, got = (x * norm).double() @ old.double().t(), (x * new_norm).double() @ new.double().t()
        # three roundings of float32 per term, of which there are 64
        bound = 4 * torch.finfo(torch.float32).eps * ((x * norm).abs().double() @ old.abs().double().t())
        assert ((exact - got).abs() <= bound).all()


def test_scales_that_leave_float16_are_refused() -> None:
    norm, weight = torch.ones(2, dtype=torch.float16), torch.full((1, 2), 60000.0, dtype=torch.float16)
    assert fold(norm, [weight], torch.ones(2))[1][0].dtype == torch.float16
    with pytest.raises(ValueError, match="lower alpha"):
        fold(norm, [weight], torch.tensor([0.01, 100.0]))


def test_scaling_lowers_the_entropy(generator: torch.Generator) -> None:
    top = torch.exp(torch.randn(512, generator=generator))  # channels of very different size
    weight = torch.randn(512, 512, generator=generator) * 0.02
    bits = []
    for alpha in (0.0, 0.5, 1.0):
        (scaled,) = fold(torch.ones(512), [weight], channel_scales(top, alpha))[1]
        bits.append(entropy_bits(quantize(scaled, per_channel=True).qweight))
    assert bits[0] - bits[1] > 0.5 and bits[1] - bits[2] > 0.5


def int4(generator: torch.Generator, columns: int = 33) -> Int4Weight:
    q = torch.randint(0, 16, (6, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(6, -(-columns // 8), generator=generator).half()
    return Int4Weight(pack_int4(q), scale, None, 8, columns)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_exactly_the_lowest_scores_go(generator: torch.Generator, kind: str, fraction: float) -> None:
    weight = quantize(torch.randn(6, 33, generator=generator), True) if kind == "int8" else int4(generator)
    top = torch.rand(33, generator=generator)
    before = weight.qweight if isinstance(weight, Int8Weight) else weight.integers()
    pruned = prune_integers(weight, top, fraction)
    after = pruned.qweight if isinstance(pruned, Int8Weight) else pruned.integers()
    gone = after != before
    assert (after[gone] == 0).all()
    assert (after == 0).sum() >= round(fraction * before.numel())
    assert gone.sum() + (before == 0).sum() <= max(round(fraction * before.numel()), int((before == 0).sum()))
    score = before.abs() * top
    if bool(gone.any()) and not bool(gone.all()):
        kept = score[after != 0]
        assert kept.numel() == 0 or score[gone].max() <= kept.min()
    assert torch.equal(pruned.scale, weight.scale)


def test_equal_scores_go_in_order() -> None:
    weight = Int8Weight(torch.full((2, 4), 3, dtype=torch.int8), torch.ones(2))
    pruned = prune_integers(weight, torch.ones(4), 0.5)
    assert pruned.qweight.tolist() == [[0, 0, 0, 0], [3, 3, 3, 3]]


def test_what_cannot_be_pruned(generator: torch.Generator) -> None:
    weight = int4(generator)
    weight.zero = torch.full((6, 5), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="symmetric"):
        prune_integers(weight, torch.ones(33), 0.1)
    with pytest.raises(ValueError, match="give 0 to 1"):
        prune_integers(int4(generator), torch.ones(33), 1.5)


def test_predicted_bytes_are_those_of_the_coder(generator: torch.Generator) -> None:
    weight = quantize(torch.randn(1024, 1024, generator=generator), True)
    packed = pack_int4((torch.randn(1024, 2048, generator=generator) * 2).round().clamp(-8, 7).add(8).to(torch.uint8))
    for candidate in (
        weight,
        prune_integers(weight, torch.ones(1024), 0.3),
        Int4Weight(packed, torch.ones(1024, 16).half(), None, 128, 2048),
    ):
        assert encode(candidate.qweight).nbytes == pytest.approx(coded_bytes(candidate), rel=0.02)
