"""How many users there are when."""

from __future__ import annotations

import pytest

from loadtest.shapes import users_at


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [20, 20, 20, 20, None]),
        ("ramp", [1, 5, 10, 20, None]),
        ("step", [4, 8, 12, 20, None]),
        ("soak", [1, 20, 20, 20, None]),
    ],
)
def test_the_plan(shape: str, expected: list[int | None]) -> None:
    assert [users_at(shape, t, 100.0, 20) for t in (0.0, 25.0, 50.0, 99.9, 100.0)] == expected


def test_a_soak_rises_for_a_minute_at_most() -> None:
    assert users_at("soak", 30.0, 36000.0, 10) == 5
    assert users_at("soak", 60.0, 36000.0, 10) == 10


def test_shapes_with_an_end_need_one() -> None:
    assert users_at("constant", 1e6, None, 3) == 3
    with pytest.raises(ValueError, match="ramp needs --run-time"):
        users_at("ramp", 0.0, None, 3)
