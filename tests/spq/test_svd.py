from __future__ import annotations

import pytest
import torch

from spq.config import SigmaPlacement, SPQConfig
from spq.quantize import quantize
from spq.svd import choose_rank, decompose, energy_rank

SHAPES = [(24, 24), (12, 40), (40, 12)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", ["down", "up", "split"])
def test_full_rank_pair_is_the_matrix(shape: tuple[int, int], sigma: SigmaPlacement) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    down, up = decompose(weight).factors(min(shape), sigma)
    assert down.shape == (min(shape), shape[1]) and up.shape == (shape[0], min(shape))
    # eps of float32 times the norms met on the way: vectors are rounded to float32 once each
    assert (up @ down - weight).abs().max() < 40 * torch.finfo(torch.float32).eps * weight.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    spectrum = decompose(weight)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(spectrum.energy, s**2, rtol=1e-10, atol=1e-10)
    for sigma in ("down", "up", "split"):
        down, up = spectrum.factors(5, sigma)  # type: ignore[arg-type]
        best = (u[:, :5] * s[:5]) @ vh[:5]
        torch.testing.assert_close((up @ down).double(), best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_sigma_sits_where_it_is_asked_for(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    spectrum = decompose(weight)
    sigma, ones = spectrum.energy[:4].sqrt().float(), torch.ones(4)
    for placement, down_norm, up_norm in (
        ("down", sigma, ones),
        ("up", ones, sigma),
        ("split", sigma.sqrt(), sigma.sqrt()),
    ):
        down, up = spectrum.factors(4, placement)  # type: ignore[arg-type]
        torch.testing.assert_close(down.norm(dim=1), down_norm, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(up.norm(dim=0), up_norm, rtol=1e-5, atol=1e-5)


def test_row_scales_absorb_sigma_on_the_down_side() -> None:
    """int8 of sigma * v with a scale per row is int8 of v with the scale times sigma: same integers."""
    directions = torch.linalg.qr(torch.randn(64, 6, generator=torch.Generator().manual_seed(4))).Q.T.contiguous()
    sigma = torch.tensor([64.0, 16.0, 4.0, 1.0, 0.25, 0.0625])  # powers of two: exact in floating point
    plain, scaled = quantize(directions, True), quantize(directions * sigma[:, None], True)
    assert torch.equal(plain.qweight, scaled.qweight)
    torch.testing.assert_close(scaled.scale, plain.scale * sigma, rtol=0, atol=0)


def test_energy_rank_by_hand() -> None:
    energy = torch.tensor([8.0, 1.0, 0.5, 0.5], dtype=torch.float64)  # shares .8 .9 .95 1
    assert [energy_rank(energy, t) for t in (0.5, 0.8, 0.81, 0.9, 0.96, 1.0)] == [1, 1, 2, 2, 4, 4]
    assert energy_rank(torch.zeros(4, dtype=torch.float64), 0.9) == 1


def spectrum_of_rank(rank: int, size: int) -> torch.Tensor:
    """Flat over `rank`, so that the 0.999 energy rank is exactly `rank` for the sizes used here."""
    energy = torch.zeros(size, dtype=torch.float64)
    energy[:rank] = 1.0
    return energy


@pytest.mark.parametrize(
    ("shape", "needed", "rank"),
    [
        ((128, 128), 63, 63),  # 63 * 256 < 16384
        ((128, 128), 64, None),  # equal: not fewer parameters
        ((288, 288), 100, 100),  # int() may lose one, see below
        ((50, 50), 3, None),  # 2500 < 5000 elements
        ((1024, 4096), 819, 819),  # 0.7998 of 1024 and 0.02 % fewer parameters: the published rule accepts it
        ((1024, 4096), 820, None),  # above 0.8
        ((1024, 4096), 1024, None),
        ((256, 8192), 204, 204),  # only here does 0.8 decide: 248 would still have fewer parameters
        ((256, 8192), 210, None),
    ],
)
def test_released_rule_by_hand(shape: tuple[int, int], needed: int, rank: int | None) -> None:
    options = SPQConfig.preset("paper", variance_threshold=0.9999)
    choice = choose_rank(spectrum_of_rank(needed, min(shape)), shape, False, 1, options)
    assert choice.energy_rank == needed
    removed = max(0.1, min(1 - needed / min(shape), 1.0))
    expected = None if rank is None else max(1, int((1 - removed) * min(shape)))  # the published expression
    assert choice.rank == expected
    if rank is not None and min(shape) & (min(shape) - 1) == 0:
        assert choice.rank == rank  # no truncation loss for powers of two


def test_released_rule_ignores_the_bias_on_both_sides() -> None:
    options = SPQConfig.preset("paper", variance_threshold=0.9999)
    assert choose_rank(spectrum_of_rank(64, 128), (128, 128), True, 1, options).rank is None


@pytest.mark.parametrize(
    ("shape", "needed", "rank"),
    [
        ((2048, 2048), 850, 896),  # tile 64
        ((2048, 2048), 897, None),  # 960 * 4096 saves 6 % only
        ((1024, 4096), 600, 608),  # tile 32
        ((1024, 4096), 819, None),  # what the published rule takes for 0.02 %
        ((64, 64), 25, None),  # 32: half of a square saves nothing
        ((64, 64), 24, 24),
    ],
)
def test_default_rule_rounds_and_asks_for_a_margin(shape: tuple[int, int], needed: int, rank: int | None) -> None:
    options = SPQConfig.preset("default", variance_threshold=0.9999)
    choice = choose_rank(spectrum_of_rank(needed, min(shape)), shape, False, 1, options)
    assert choice.rank == rank
    if rank is not None:
        whole = shape[0] * shape[1] + 4 * shape[0]
        assert rank * sum(shape) + 4 * (rank + shape[0]) <= 0.9 * whole
