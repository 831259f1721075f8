"""In Ray's proxy, around its own application: requests whose replica was lost are sent again, and streams end in words.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=server.ray_edge:middleware` in the environment of every node puts it there.
Without it a client gets Ray's own answers: 500 for a request that was lost, and a stream that breaks off. It imports no
engine and no torch. Not how requests are routed (Ray's router does that) and nothing of the model.
"""

from __future__ import annotations

import logging

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.failures import error_body, error_response
from server.api.sse import event, named_event
from server.errors import Overloaded, ServeError

logger = logging.getLogger("ray.serve")  # the only one that Ray writes to the proxy's log

# The first to be lost may be the request's own doing, a second one hardly chance: it must not go through all replicas.
ATTEMPTS = 2
MAX_KEPT = 8 * 1024 * 1024  # bytes of a body kept to be sent again; the default of --max-body
RETRY_AFTER_S = 1
# By these a client could take away what ends its request: Ray's limit on time, and its own leaving.
NOT_FOR_CLIENTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


def middleware() -> list[Middleware]:
    """What Ray's proxy asks for."""
    return [Middleware(Edge)]


class Edge:
    """Plain ASGI. A request is sent again while nothing of an answer has reached the client, so it is answered once."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in NOT_FOR_CLIENTS]}
        request = _Request(receive)
        answer = _Answer(scope, receive, send)
        for _ in range(ATTEMPTS):
            await self.app({**scope, "headers": list(scope["headers"])}, request.from_the_start(), answer.send)
            if answer.started or request.client_is_gone:
                break
            if not request.can_be_repeated:
                logger.warning("a request was lost with its replica; its body is too long to be sent again")
                break
            logger.warning("a request was lost with its replica, before its answer began")
        if not request.client_is_gone:
            await answer.finish()


class _Request:
    """A body that can be received again, and whether the client has left."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._num_bytes = 0
        self.can_be_repeated = True
        self.client_is_gone = False

    def from_the_start(self) -> Receive:
        """A `receive` that begins with what was received before."""
        again = iter(list(self._kept))

        async def receive() -> Message:
            message = next(again, None)
            return await self._next() if message is None else message

        return receive

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.client_is_gone = True
            return message
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes <= MAX_KEPT:
            self._kept.append(message)
        else:
            self._kept.clear()
            self.can_be_repeated = False
        return message


class _Answer:
    """What went to the client, and the end of it that a lost replica could not send."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.started = False
        self._ended = False
        self._is_stream = False
        self._is_refusal = False  # Ray's own, whose text is replaced
        self._num_events = 0

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            kind = headers.get("content-type", "")
            self._is_stream = kind.startswith("text/event-stream")
            if message["status"] == 503 and not kind.startswith("application/json"):
                self._is_refusal = True
                return
            request_ids = headers.getlist("x-request-id")
            if len(request_ids) > 1:  # the replica's, and the same again by Ray
                headers["x-request-id"] = request_ids[0]
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
            if self._is_refusal:
                if self._ended:
                    await self._refuse(Overloaded("every replica is busy and the queue is full; retry later",
                                                  retry_after_s=RETRY_AFTER_S))  # fmt: skip
                return
            self._num_events += message.get("body", b"").count(b"\n\n")
        await self._send(message)

    async def finish(self) -> None:
        """Say that the replica is gone, where an answer did not begin or a stream did not end."""
        if self._ended:
            return
        what = "writing this answer" if self.started else "working on this request"
        error = Overloaded(f"the replica that was {what} is gone; send the request again",
                           retry_after_s=RETRY_AFTER_S, code="replica_lost")  # fmt: skip
        if not self.started:
            await self._refuse(error)
        elif self._is_stream:
            logger.warning("a stream broke off with its replica")
            body = error_event(self._scope["path"], error, self._num_events)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        # else a body that is cut short: the web server closes the connection, and the client's library says so

    async def _refuse(self, error: ServeError) -> None:
        await error_response(error)(self._scope, self._receive, self._send)


def error_event(path: str, error: ServeError, num_events: int) -> bytes:
    """The last event of a stream of which `num_events` were sent, as the API at `path` writes it."""
    body = error.to_openai()
    if path == "/v1/messages":
        return named_event("error", body)
    if path == "/v1/responses":
        fields = {name: body["error"][name] for name in ("code", "message", "param")}
        return named_event("error", {"sequence_number": num_events, **fields, **body})
    return event(error_body(error))
