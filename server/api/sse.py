"""Server-sent events, and racing work against the client's leaving.

The first event is awaited before the response starts, so that a failure before it still gets its own status; a later
one becomes an error event, and the stream ends without [DONE].
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.failures import ClientGone, error_body
from server.errors import ServeError

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(payload: bytes) -> bytes:
    """One event. The payload has no line breaks, as JSON without indentation has none."""
    return b"data: " + payload + b"\n\n"


def named_event(kind: str, fields: Mapping[str, Any]) -> bytes:
    """One event with a name, which its data repeats as `type`."""
    return f"event: {kind}\n".encode() + event(to_json({"type": kind, **fields}))


def _error_event(error: ServeError) -> bytes:
    return event(error_body(error))


class EventStream(Response):
    """Sends each item of `events`, one whole event or several. The generator is closed however the stream ends.

    `error_event` writes the last one where it ends by an error.
    """

    def __init__(
        self, events: AsyncGenerator[bytes], error_event: Callable[[ServeError], bytes] = _error_event
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                           "X-Accel-Buffering": "no"})  # fmt: skip
        self._events = events
        self._error_event = error_event
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; raises ServeError or ClientGone only where nothing was sent yet."""
        try:
            await until_disconnect(receive, self._write(send))
        except ClientGone:
            if not self._started:
                raise

    async def _write(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for piece in events:
                    await self._send(send, piece)
        except Exception as error:
            if not self._started:
                raise
            if not isinstance(error, ServeError):
                logger.exception("a stream failed")
                error = ServeError("internal error; the stream cannot go on")
            await self._send(send, self._error_event(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, piece: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": piece, "more_body": True})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves first; then raises ClientGone.

    The request's body must have been read.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
