"""One client's connection: uvicorn's, with limits on the time that a client may take and on how many there are.

A head that never ends, an upload that stops and an answer that nobody reads each hold a descriptor, and the last one a
sequence and its pages. uvicorn bounds none of them; nginx does (client_header_timeout, client_body_timeout,
send_timeout), with 60 s each, the default here too. Not deadlines of requests (`server.api.generate`) and not their
sizes (`server.api.middleware`). What is no HTTP at all is answered here as well, with OpenAI's error body.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import BadRequest, Overloaded, RequestTimeout, ServeError

OWN_DESCRIPTORS = 64  # of the process, for files, pipes and the listening socket; the rest may be connections
RETRY_AFTER_S = 5


def most_connections() -> int:
    """Connections that the process may hold at a time, by its limit on open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if soft == resource.RLIM_INFINITY else max(1, soft - OWN_DESCRIPTORS)


class Connection(HttpToolsProtocol):
    """`client_timeout_s` is for a whole head, for the next part of a body, and for reading the next part of an answer.

    `rejected` is told the code of each refusal that no application saw.
    """

    def __init__(
        self, *args: Any, client_timeout_s: float, most: int, rejected: Callable[[str], None], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limit_s = client_timeout_s
        self._most = most
        self._rejected = rejected
        self._read_timer: asyncio.TimerHandle | None = None  # while a head or a body is awaited
        self._write_timer: asyncio.TimerHandle | None = None  # while the client reads too little
        self._in_head = False
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head, or refuse one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._refuse(
                Overloaded(
                    f"{self._most} connections are open, all that the limit on open files allows; try again, or raise "
                    "the limit (ulimit -n)",
                    retry_after_s=RETRY_AFTER_S,
                    code="too_many_connections",
                )
            )
            return
        self._await_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_reading_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a head: also of a later request, whose wait was uvicorn's keep-alive time so far."""
        super().on_message_begin()
        self._in_head = True
        self._await_more()

    def on_headers_complete(self) -> None:
        """The head is whole; a body may follow."""
        self._in_head, self._in_body = False, True
        self._await_more()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._await_more()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._in_body = False
        self._stop_reading_timer()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads less than it is sent."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limit_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse(BadRequest(f"this is no HTTP/1.1 request: {msg}", code="invalid_http"))

    def _await_more(self) -> None:
        self._stop_reading_timer()
        self._read_timer = self.loop.call_later(self._limit_s, self._on_silence)

    def _stop_reading_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _on_silence(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or (answering and not self._in_body):
            self._await_more()  # it is this side that does not read, or an earlier request's answer is on its way
        elif (self._in_head or self._in_body) and not (answering and self.cycle.response_started):
            what = "head" if self._in_head else "body"
            self._refuse(
                RequestTimeout(
                    f"nothing more of the request's {what} came within {self._limit_s:g} s; send it faster, or raise "
                    "--client-timeout"
                )
            )
        else:
            self.transport.close()

    def _refuse(self, error: ServeError) -> None:
        """Answer outside of any application, and close."""
        self._rejected(str(error.code))
        body = json.dumps(error.to_openai()).encode()
        headers = {**error.headers, "Content-Type": "application/json", "Content-Length": len(body)}
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in {**headers, "Connection": "close"}.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
