from __future__ import annotations

import pytest
import torch

from spq.moments import Moments

CPU = torch.device("cpu")


def test_moments_by_hand() -> None:
    moments = Moments(2, CPU)
    moments.add(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    moments.add(torch.tensor([[[-5.0, 1.0]]]))  # any leading dimensions
    assert moments.count == 3
    expected = torch.tensor([[35.0, -7.0], [-7.0, 5.0]], dtype=torch.float64) / 3
    torch.testing.assert_close(moments.second, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.mean, torch.tensor([-1 / 3, -1 / 3], dtype=torch.float64), rtol=1e-14, atol=0)
    assert moments.peak.tolist() == [5.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pieces_do_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn((4000, 16), generator=torch.Generator().manual_seed(0)).to(dtype) * 3 + 1
    x = x.float().to(dtype)
    whole = x.double()
    for pieces in (1, 7, 4000):
        moments = Moments(16, CPU)
        for piece in x.chunk(pieces):
            moments.add(piece)
        assert moments.count == 4000
        # float32 products: eps sqrt(rows) of the mean square at worst
        torch.testing.assert_close(moments.second, whole.T @ whole / 4000, rtol=4e-6, atol=4e-5)
        torch.testing.assert_close(moments.mean, whole.mean(dim=0), rtol=1e-6, atol=1e-6)
        assert torch.equal(moments.peak, x.float().abs().amax(dim=0))


def test_many_calls_do_not_lose_digits() -> None:
    """A float32 sum of 200,000 ones and a bit would be off by more than this."""
    moments, x = Moments(1, CPU), torch.full((100, 1), 1.1)
    for _ in range(2000):
        moments.add(x)
    square = float((x[:1] * x[:1]).double().sum())
    assert float(moments.second) == pytest.approx(square, rel=1e-5)
    assert float(moments.mean) == pytest.approx(float(x[0].double()), rel=1e-12)


def test_no_rows_change_nothing() -> None:
    moments = Moments(3, CPU)
    moments.add(torch.empty((0, 3)))
    assert moments.count == 0 and moments.finite and not moments.second.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_values_are_seen(bad: float) -> None:
    moments = Moments(3, CPU)
    moments.add(torch.ones((4, 3)))
    assert moments.finite
    moments.add(torch.tensor([[1.0, bad, 1.0]]))
    assert not moments.finite
    moments.add(torch.ones((4, 3)))  # and never forgotten
    assert not moments.finite
