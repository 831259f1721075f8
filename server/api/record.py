"""What is known of one HTTP request: filled in along its way, read at its end by the access log, traces and limits.

Nothing of a prompt or an answer but counts and times. It travels in a context variable, which tasks made for a request
inherit, so that no handler has to hand it on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Phases:
    """Monotonic seconds of a request's sequences together: the first to get there, but the last token of the last."""

    arrived_s: float
    scheduled_s: float | None
    first_token_s: float | None
    last_token_s: float | None

    @property
    def queue_s(self) -> float | None:
        """Arrival to first scheduled."""
        return None if self.scheduled_s is None else self.scheduled_s - self.arrived_s

    @property
    def prefill_s(self) -> float | None:
        """First scheduled to first token."""
        if self.scheduled_s is None or self.first_token_s is None:
            return None
        return self.first_token_s - self.scheduled_s

    @property
    def decode_s(self) -> float | None:
        """First token to last token."""
        if self.first_token_s is None or self.last_token_s is None:
            return None
        return max(0.0, self.last_token_s - self.first_token_s)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request for answers asked for; numbers are those of its first prompt."""

    response_id: str
    n: int  # answers to each prompt
    num_sequences: int
    max_tokens: int
    temperature: float
    top_p: float


def _charge_nobody(_: int) -> None:
    """No limit on tokens."""


@dataclass(slots=True)
class RequestRecord:
    """One request. `key` is the name of a key, never the key; `error` is the code of the error that was sent."""

    request_id: str = ""
    method: str = ""
    path: str = ""
    started_s: float = field(default_factory=time.monotonic)
    wants_timings: bool = False  # in `usage`
    traceparent: str | None = None  # W3C Trace Context of the client, as it came
    tracestate: str | None = None
    route: str = "unmatched"  # the handler's path, with the names of its parameters
    key: str | None = None
    model: str | None = None
    asked: Asked | None = None  # where answers are generated
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)  # of its answers, in their order
    phases: Phases | None = None  # once its sequences ended
    status: int = 0  # 0: the client left before there was one
    error: str | None = None
    ended_s: float = 0.0  # monotonic
    charge: Callable[[int], None] = _charge_nobody  # told of tokens as they are handed out

    def add_prompt(self, num_tokens: int, num_cached: int) -> None:
        """A prompt whose first output was handed out."""
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached
        self.charge(num_tokens)

    def add_tokens(self, count: int) -> None:
        """Tokens handed out."""
        self.completion_tokens += count
        self.charge(count)


_current: ContextVar[RequestRecord] = ContextVar("request_record")


def current_record() -> RequestRecord:
    """The record of the request that the caller serves; one that nobody reads where it serves none."""
    return _current.get(None) or RequestRecord()


def begin_record(record: RequestRecord) -> None:
    """Make it the current one of this task and of those it will start."""
    _current.set(record)
