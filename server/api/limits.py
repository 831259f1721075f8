"""Requests and tokens that each API key may use a minute: 429 with Retry-After beyond them, before the body is read.

Tokens are charged as they are handed out, streamed or not: a prompt with its first token. What is running is never cut,
so a key may end below zero, by at most what it had running, and waits longer for its next request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.failures import error_response
from server.api.keys import Key
from server.api.record import current_record
from server.errors import RateLimited
from server.metrics import Metrics


class Bucket:
    """Fills evenly to its limit within a minute, and starts full."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._read_s = clock()

    def level(self) -> float:
        """What is left now; below 0 where more was taken than there was."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._read_s) * self.per_minute / 60)
        self._read_s = now
        return self._level

    def take(self, count: int) -> None:
        """Whether or not there is enough."""
        self._level = self.level() - count

    def wait_s(self) -> int:
        """Whole seconds until one is left; 0 where it is."""
        return max(0, math.ceil((1 - self.level()) * 60 / self.per_minute))


class RateLimit:
    """Counts every POST of a limited key, and the tokens handed out for it."""

    def __init__(self, app: ASGIApp, keys: Sequence[Key], metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self._buckets = {
            key.name: {
                what: Bucket(limit)
                for what, limit in (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute))
                if limit is not None
            }
            for key in keys
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        record = current_record()
        buckets = self._buckets.get(record.key or "", {})
        if scope["type"] != "http" or scope["method"] != "POST" or not buckets:
            await self.app(scope, receive, send)
            return
        what, wait_s = max(((what, bucket.wait_s()) for what, bucket in buckets.items()), key=lambda pair: pair[1])
        if wait_s > 0:
            self.metrics.rejected("rate_limit_exceeded")
            error = RateLimited(
                f"the key {record.key} has used its {buckets[what].per_minute} {what} per minute; retry in {wait_s} s",
                what=what,
                retry_after_s=wait_s,
            )
            await error_response(error)(scope, receive, _with_levels(buckets, send))
            return
        if "requests" in buckets:
            buckets["requests"].take(1)
        if "tokens" in buckets:
            record.charge = buckets["tokens"].take
        await self.app(scope, receive, _with_levels(buckets, send))


def _with_levels(buckets: dict[str, Bucket], send: Send) -> Send:
    """Says in OpenAI's headers what is left when the answer begins."""

    async def send_with_levels(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for what, bucket in buckets.items():
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level())))
        await send(message)

    return send_with_levels
