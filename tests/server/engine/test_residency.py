from __future__ import annotations

import pytest

from server.engine.residency import LayerBytes, Rates, plan

# per byte: kernels 1 ms, decoding 10 ms; nothing overlaps
RATES = Rates(decode=100.0, run_decoded=1000.0, run_coded=1000.0, overlap=0.0, rest_s=0.01)
LAYERS = {n: LayerBytes(decoded=10, coded=2, arena=10) for n in range(10)}


def test_the_formula_of_a_step() -> None:
    assert RATES.decoded_s(10) == pytest.approx(0.01)
    assert RATES.coded_s(10) == pytest.approx(0.11)
    own_cores = Rates(decode=100.0, run_decoded=1000.0, run_coded=1000.0, overlap=1.0, rest_s=0.0)
    assert own_cores.coded_s(10) == pytest.approx(max(0.01, 0.1))
    slow_kernels = Rates(decode=100.0, run_decoded=10.0, run_coded=10.0, overlap=1.0, rest_s=0.0)
    assert slow_kernels.coded_s(10) == pytest.approx(max(1.0, 0.1))  # decoding is hidden


def test_everything_is_coded_where_speed_does_not_matter() -> None:
    found = plan(LAYERS, RATES, 1.0)
    assert found.coded == tuple(range(10))
    assert found.decoded_token_s == pytest.approx(0.01 + 10 * 0.01)
    assert found.token_s == pytest.approx(0.01 + 10 * 0.11)
    assert found.saved_bytes == 10 * 8 - 20


@pytest.mark.parametrize("tolerance", [0.8, 0.85, 0.9])
def test_tokens_per_second_fall_by_the_tolerance_at_most(tolerance: float) -> None:
    found = plan(LAYERS, RATES, tolerance)
    assert 0 < len(found.coded) < 10
    assert 1 / found.token_s >= (1 - tolerance) / found.decoded_token_s
    one_more = found.token_s + 0.1
    assert 1 / one_more < (1 - tolerance) / found.decoded_token_s


def test_nothing_is_coded_where_the_arena_takes_what_is_saved() -> None:
    assert plan(LAYERS, RATES, 0.0).coded == ()
    two = plan({n: LAYERS[n] for n in range(2)}, RATES, 1.0)  # 2 x 8 saved, an arena of 20
    assert two.coded == () and two.token_s == two.decoded_token_s and two.saved_bytes == 0
    assert plan({n: LayerBytes(10, 11, 10) for n in range(9)}, RATES, 1.0).coded == ()


def test_the_layers_that_shrink_most_go_first() -> None:
    layers = {n: LayerBytes(decoded=10, coded=9 if n % 2 else 2, arena=10) for n in range(10)}
    found = plan(layers, RATES, 0.83)
    assert set(found.coded) == {0, 2, 4, 6, 8}


def test_hidden_decoding_costs_nothing() -> None:
    rates = Rates(decode=2000.0, run_decoded=1000.0, run_coded=1000.0, overlap=1.0, rest_s=0.01)
    found = plan(LAYERS, rates, 0.0)
    assert found.coded == tuple(range(10)) and found.token_s == pytest.approx(found.decoded_token_s)
