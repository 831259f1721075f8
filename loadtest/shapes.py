"""How many users there are when: constant, ramp, step or soak, as numbers. Nothing of locust's is imported here."""

from __future__ import annotations

import math

RISE_SHARE, RISE_S = 0.05, 60.0  # a soak rises for so much of its time, and no longer than this


def users_at(shape: str, elapsed_s: float, run_s: float | None, users: int, steps: int = 5) -> int | None:
    """Users that should be there; None when the run has ended.

    ramp: from one to `users` over the whole run. step: `steps` plateaus of equal length and rise. soak: a short rise,
    then `users` to the end. Raises ValueError for these three where `run_s` is None.
    """
    if run_s is None:
        if shape != "constant":
            raise ValueError(f"the shape {shape} needs --run-time")
        return users
    if elapsed_s >= run_s:
        return None
    share = elapsed_s / run_s
    if shape == "ramp":
        return max(1, math.ceil(users * share))
    if shape == "step":
        return max(1, math.ceil(users * (math.floor(share * steps) + 1) / steps))
    if shape == "soak":
        rise_s = min(RISE_SHARE * run_s, RISE_S)
        return max(1, min(users, math.ceil(users * elapsed_s / rise_s)))
    return users
