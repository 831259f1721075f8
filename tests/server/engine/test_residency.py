from __future__ import annotations

import pytest

from server.engine.residency import LayerBytes, Rates, plan

# per byte: kernels 1 ms, decoding 10 ms; nothing overlaps
RATES = Rates(feed=100.0, run_decoded=1000.0, run_coded=1000.0, overlap=0.0, rest_s=0.01)
LAYERS = {n: LayerBytes(decoded=10, coded=2, arena=10) for n in range(10)}


def test_the_formula_of_a_step() -> None:
    assert RATES.decoded_s(10) == pytest.approx(0.01)
    assert RATES.coded_s(10) == pytest.approx(0.11)
    own_cores = Rates(feed=100.0, run_decoded=1000.0, run_coded=1000.0, overlap=1.0, rest_s=0.0)
    assert own_cores.coded_s(10) == pytest.approx(max(0.01, 0.1))
    slow_kernels = Rates(feed=100.0, run_decoded=10.0, run_coded=10.0, overlap=1.0, rest_s=0.0)
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
    rates = Rates(feed=2000.0, run_decoded=1000.0, run_coded=1000.0, overlap=1.0, rest_s=0.01)
    found = plan(LAYERS, rates, 0.0)
    assert found.coded == tuple(range(10)) and found.token_s == pytest.approx(found.decoded_token_s)


# What lies on a card: coded bytes are on the host, so a coded layer frees all of itself.
ON_CARD = {n: LayerBytes(decoded=10, coded=0, arena=12) for n in range(10)}


def test_what_has_no_room_stays_coded_at_any_price() -> None:
    for room, kept in ((120, 10), (119, 7), (108, 7), (107, 6), (36, 1), (35, 0), (24, 0)):
        found = plan(ON_CARD, RATES, 0.0, room)
        assert 10 - len(found.coded) == kept, room
        assert found.for_room == len(found.coded)
        arena = 24 if found.coded else 0
        assert 12 * kept + arena <= room
    slowest = plan(ON_CARD, RATES, 0.0, 36)
    assert slowest.token_s == pytest.approx(0.01 + 0.01 + 9 * 0.11)
    assert slowest.decoded_token_s == pytest.approx(0.01 + 10 * 0.01)


def test_where_not_even_the_arena_has_room_everything_is_coded() -> None:
    assert plan(ON_CARD, RATES, 0.0, 10).coded == tuple(range(10))
    assert plan(ON_CARD, RATES, 0.0, -10).coded == tuple(range(10))


def test_room_adds_to_what_the_tolerance_allows() -> None:
    by_speed = plan(ON_CARD, RATES, 0.85)
    assert 2 < len(by_speed.coded) < 8 and by_speed.for_room == 0
    found = plan(ON_CARD, RATES, 0.85, 24 + 12)
    assert set(by_speed.coded) < set(found.coded) and len(found.coded) == 9
    assert found.for_room == 9 - len(by_speed.coded)
    assert plan(ON_CARD, RATES, 0.85, 1000) == by_speed


def test_a_graph_that_is_lost_counts_against_the_tolerance() -> None:
    """Steps with coded layers are launched one by one: all layers then run at 1000, recorded ones at 4000 bytes/s."""
    rates = Rates(feed=1e9, run_decoded=1000.0, run_coded=1000.0, overlap=1.0, rest_s=0.0, recorded=4000.0)
    assert plan(ON_CARD, rates, 0.7).coded == ()
    assert plan(ON_CARD, rates, 0.7).token_s == pytest.approx(0.025)
    found = plan(ON_CARD, rates, 0.8)
    assert found.coded == tuple(range(10))
    assert (found.decoded_token_s, found.token_s) == (pytest.approx(0.025), pytest.approx(0.1))
