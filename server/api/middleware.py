"""What happens to every request, whatever its route: an id, a record, a place, a limit of its body. Plain ASGI.

Starlette's BaseHTTPMiddleware would buffer streams and hide disconnects, so these wrap receive and send themselves.
Order, from outside: RequestContext, CORS (Starlette's, where asked for), ApiKey (`keys`), Shed, RateLimit (`limits`),
BodyLimit, then FastAPI.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.failures import error_response
from server.api.record import RequestRecord, begin_record
from server.errors import Overloaded, PayloadTooLarge, ServeError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUEUED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"})
YES = frozenset({"1", "true", "yes", "on"})


class RequestContext:
    """Request id on every response, a record and a metrics sample of every request, HEAD as GET, 500 as JSON.

    `on_end` are told of each record once its request has ended.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, on_end: Sequence[Callable[[RequestRecord], None]]) -> None:
        self.app = app
        self.metrics = metrics
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        method, path = scope["method"], scope["path"]
        record = RequestRecord(request_id, method, path)
        record.wants_timings = headers.get("x-include-timings", "").lower() in YES
        record.traceparent, record.tracestate = headers.get("traceparent"), headers.get("tracestate")
        begin_record(record)
        # A copy: the web server reads the original to know that a HEAD answer has no body.
        scope = {**scope, "method": "GET" if method == "HEAD" else method}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if record.status:
                raise  # too late for an answer: the web server closes the connection
            error = ServeError(f"internal error; the server's log has it under request id {request_id}")
            await error_response(error)(scope, receive, send_with_id)
        finally:
            record.ended_s = time.monotonic()
            record.route = getattr(scope.get("route"), "path", record.route)
            known = method if method in KNOWN_METHODS else "other"
            self.metrics.http(record.route, known, record.status, record.ended_s - record.started_s)
            for tell in self.on_end:
                tell(record)


class Shed:
    """503 for work that would find no place in the queue, before its body is read.

    Reading, validating and tokenizing a body to refuse it takes 1 to 2 ms; ten times as many requests as can be served
    would leave those that are served no time.
    """

    def __init__(self, app: ASGIApp, check_room: Callable[[], None], metrics: Metrics) -> None:
        self.app = app
        self.check_room = check_room
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in QUEUED_PATHS:
            try:
                self.check_room()
            except Overloaded as error:
                self.metrics.rejected(str(error.code))
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """413 for a body over `max_bytes`: at once where its length is declared, else when it has grown too long."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self.max_bytes:
            await error_response(self._error(f"of {declared[:20]} bytes"))(scope, receive, send)
            return
        num_bytes = 0

        async def counted_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise self._error("sent in chunks")
            return message

        await self.app(scope, counted_receive, send)

    def _error(self, what: str) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the body {what} exceeds the limit of {self.max_bytes} bytes; send less, or raise --max-body",
            headers={"Connection": "close"},
        )


def _request_id(given: str | None) -> str:
    """The client's id where it is short printable ASCII, else a new one."""
    if given and len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex
