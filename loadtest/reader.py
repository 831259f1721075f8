"""Sends one request for locust, reads its stream, and fires the events that locust counts.

| type | name | what |
|---|---|---|
| POST | kind | the whole request, sent to last byte; a failure has the server's message |
| ttft | kind | sent to the first text |
| itl | kind | between two pieces of text |
| refused | kind and status | 429 and 503: no failure, but no answer either; then Retry-After is waited for |
| left | kind | we hung up, as meant |

A connection per request, as of many clients: what a server holds for one goes with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import gevent
import requests

from loadtest.discover import Found, find_model
from loadtest.stream import Answer, ErrorEvent, message_of, payload_of, take_event
from loadtest.tally import Tally

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REFUSALS = (429, 503)
CONNECT_S, READ_S = 10.0, 600.0  # a queue may hold the first byte back for long
FOUND: dict[str, Found] = {}  # by host: asked once, not by each user


class Failed(Exception):
    """What locust shows of a request that failed; equal texts are counted together."""


@dataclass(slots=True)
class TextAnswer(Answer):
    """An answer with its text."""

    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


class Reader:
    """Of one user."""

    def __init__(self, environment: Any, host: str) -> None:
        self._environment, self._options, self._host = environment, environment.parsed_options, host.rstrip("/")
        self._headers = {"Authorization": f"Bearer {self._options.bearer}"} if self._options.bearer else {}
        if self._host not in FOUND:
            FOUND[self._host] = find_model(self._host, self._options.bearer or None)
        found = FOUND[self._host]
        self._fields: dict[str, Any] = {
            "model": self._options.model_name or found.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._options.ignore_eos == "on" or (self._options.ignore_eos == "auto" and found.takes_ignore_eos):
            self._fields["ignore_eos"] = True

    @property
    def _tally(self) -> Tally:
        tally: Tally = self._environment.tally
        return tally

    def ask(self, kind: str, path: str, body: dict[str, Any], leave_after: int | None = None) -> TextAnswer | None:
        """The answer; None where there is none, or we left it after `leave_after` pieces of text."""
        began = time.perf_counter()
        answer, size = TextAnswer(), 0
        try:
            with requests.post(
                self._host + path, json=self._fields | body, headers=self._headers, stream=True,
                timeout=(CONNECT_S, READ_S),
            ) as response:  # fmt: skip
                if response.status_code in REFUSALS:
                    self._refused(kind, response, began)
                    return None
                if response.status_code != 200:
                    raise Failed(f"HTTP {response.status_code}: {message_of(response.content)}")
                last = began
                for line in response.iter_lines(chunk_size=1):
                    payload = payload_of(line)
                    if payload is None:
                        continue
                    size += len(line)
                    last = self._take(kind, payload, answer, last)
                    if leave_after is not None and answer.chunks >= leave_after:
                        self._tally.left += 1
                        self._fire("left", kind, began, size)
                        return None
            if answer.finish_reason is None:
                raise Failed("the stream ended without a finish_reason")
        except (requests.RequestException, ErrorEvent, Failed, ValueError) as error:
            self._tally.failed += 1
            text = str(error) if isinstance(error, Failed | ErrorEvent) else f"{type(error).__name__}: {error}"
            self._fire("POST", kind, began, size, Failed(text))
            return None
        self._tally.answered += 1
        self._tally.new_tokens += answer.completion_tokens or 0
        self._fire("POST", kind, began, size)
        return answer

    def _take(self, kind: str, payload: bytes, answer: TextAnswer, last: float) -> float:
        before, now = answer.chunks, time.perf_counter()
        last = take_event(payload, answer, last, now)
        if answer.chunks > before:
            answer.pieces.append(answer.last_text)
            name, seconds = ("ttft", answer.ttft_s) if before == 0 else ("itl", answer.gaps_s[-1])
            self._fire(name, kind, now - seconds, len(payload), until=now)
        return last

    def _refused(self, kind: str, response: requests.Response, began: float) -> None:
        """Count it, and wait as long as the server asks for."""
        self._tally.refused[response.status_code] = self._tally.refused.get(response.status_code, 0) + 1
        self._fire("refused", f"{kind} {response.status_code}", began, len(response.content))
        asked = response.headers.get("Retry-After", "")
        if not asked.isdecimal():
            self._tally.refused_without_retry_after += 1
        gevent.sleep(min(float(asked) if asked.isdecimal() else 1.0, self._options.most_retry_s))

    def _fire(
        self, type_: str, name: str, began: float, size: int, error: Failed | None = None, until: float | None = None
    ) -> None:
        self._environment.events.request.fire(
            request_type=type_, name=name, response_time=1e3 * ((until or time.perf_counter()) - began),
            response_length=size, exception=error, context={},
        )  # fmt: skip
