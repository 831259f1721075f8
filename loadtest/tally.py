"""What a run of users came to, in one line of JSON at its end: answers, refusals, tokens, and what the server held.

The server is looked at before the first user and after the last, when it has had time to come to rest: whether it is
ready, what it runs, how much of its cache is taken, its memory. Where a server has no such metric, that is left out.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtest.discover import memory_ledger, read_metrics, status_of

HELD = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "cache_share": "vllm:kv_cache_usage_perc",
    "resident_bytes": "process_resident_memory_bytes",
}
REST_S = 10.0  # for a server to end what it runs for clients that are gone

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """Counts of one process of locust."""

    began_s: float
    before: dict[str, Any]
    answered: int = 0
    failed: int = 0
    left: int = 0
    new_tokens: int = 0  # of whole answers, by the server's usage
    refused: dict[int, int] = field(default_factory=dict)  # by status
    refused_without_retry_after: int = 0

    def summary(self, host: str, api_key: str | None, now_s: float) -> str:
        """One line of JSON."""
        counts = {name: value for name, value in asdict(self).items() if name not in ("began_s", "before")}
        spent = max(now_s - self.began_s, 1e-9)
        rates = {"seconds": round(spent, 1), "new_tokens_per_s": round(self.new_tokens / spent, 1)}
        return json.dumps(counts | rates | {"before": self.before, "after": at_rest(host, api_key)})


def held(host: str, api_key: str | None) -> dict[str, Any]:
    """What the server says of itself now."""
    samples = read_metrics(host, api_key)
    found: dict[str, Any] = {name: samples[metric, ""] for name, metric in HELD.items() if (metric, "") in samples}
    if ledger := memory_ledger(samples):
        found["memory_bytes"] = sum(ledger.values())
    ready = status_of(f"{host}/ready")
    return {"ready": (status_of(f"{host}/health") if ready == 404 else ready) == 200, **found}


def at_rest(host: str, api_key: str | None) -> dict[str, Any]:
    """The same, once it runs nothing, or after REST_S."""
    end = time.monotonic() + REST_S
    while (found := held(host, api_key)).get("running") and time.monotonic() < end:
        time.sleep(0.2)
    return found
