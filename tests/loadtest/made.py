"""Turns as if they had been measured."""

from __future__ import annotations

from typing import Any

from loadtest.turns import Turn


def turn(server: str, streams: int, round_: int, speed: float, *, noisy: bool = False, **more: Any) -> Turn:
    values = {"ttft_s": [0.1], "itl_s": [0.01, 0.02], "cpu_s_per_token": 0.01} | more
    return Turn(server, streams, round_, speed, others_cores=0.9 if noisy else 0.0, noisy=noisy, **values)
