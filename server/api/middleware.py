"""What happens to every request, whatever its route: an id, a log line, a limit, a key. Plain ASGI.

Starlette's BaseHTTPMiddleware would buffer streams and hide disconnects, so these wrap receive and send themselves.
Order, from outside: RequestContext, ApiKey, Shed, BodyLimit, then FastAPI.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.docs import DOCS_PATHS
from server.api.failures import error_response
from server.errors import Overloaded, PayloadTooLarge, ServeError, Unauthorized
from server.metrics import Metrics

access_log = logging.getLogger("server.access")
PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds: logged only at --log-level debug
QUIET = (200, 503)
logger = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
QUEUED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"})
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/version", "/openapi.json"}) | DOCS_PATHS
PAGE = "/page/"  # files of the page: it holds nothing, and asks with the key that its user gives


class RequestContext:
    """Request id on every response, one access line and one metrics sample a request, HEAD as GET, 500 as JSON."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        method, path = scope["method"], scope["path"]
        # A copy: the web server reads the original to know that a HEAD answer has no body.
        scope = {**scope, "method": "GET" if method == "HEAD" else method}
        status = 0
        started = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise  # too late for an answer: the web server closes the connection
            error = ServeError(f"internal error; the server's log has it under request id {request_id}")
            await error_response(error)(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            handler = getattr(scope.get("route"), "path", "unmatched")
            self.metrics.http(handler, method if method in KNOWN_METHODS else "other", status, seconds)
            level = logging.DEBUG if path in PROBES and status in QUIET else logging.INFO
            access_log.log(level, "%s %s %d %.1f ms %s", method, ascii(path)[1:-1], status, seconds * 1000, request_id)


class ApiKey:
    """401 before the body is read, on every path that is not open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http" or not self.digests or _is_open(scope["path"]) or self._known(scope):
            await self.app(scope, receive, send)
            return
        error = Unauthorized(
            "a valid API key is needed; send it as Authorization: Bearer KEY",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        header = Headers(scope=scope).get("authorization", "")
        scheme, _, key = header.partition(" ")
        given = _digest(key.strip().encode("latin-1"))
        # All keys are compared, so that the time says nothing about which one is near.
        matches = [hmac.compare_digest(given, digest) for digest in self.digests]
        return scheme.lower() == "bearer" and any(matches)


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


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(PAGE)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
