"""How many examples the fuzz tests take: a few seconds' worth, or FUZZ_TIMES as many (`FUZZ_TIMES=50 pytest …`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


def examples(count: int) -> settings:
    """Of fixtures that are made once for all examples, without limits on the time of one: the machine may be slow."""
    times = int(os.environ.get("FUZZ_TIMES", "1"))
    return settings(max_examples=count * times, deadline=None, suppress_health_check=list(HealthCheck))
