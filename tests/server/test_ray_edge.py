"""What happens in Ray's proxy around its own application, which a stand-in plays here: no Ray is needed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from models import REPOSITORY
from starlette.types import Message, Receive, Scope, Send

from server.ray_edge import ATTEMPTS, MAX_KEPT, Edge

Part = Callable[[Receive, Send], Awaitable[None]]
BODY: list[Message] = [
    {"type": "http.request", "body": b'{"prompt": ', "more_body": True},
    {"type": "http.request", "body": b'"a"}', "more_body": False},
]


class Proxy:
    """Does one thing after the other, one for each attempt, and notes the bodies it received."""

    def __init__(self, *parts: Part) -> None:
        self._parts = list(parts)
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        await self._parts.pop(0)(receive, send)


async def lose(receive: Receive, send: Send) -> None:
    """What Ray's proxy does about a replica that is gone: nothing."""


def begin(send: Send, status: int = 200, kind: str = "application/json", *more: tuple[bytes, bytes]) -> Awaitable[None]:
    headers = [(b"content-type", kind.encode()), *more]
    return send({"type": "http.response.start", "status": status, "headers": headers})


async def answer(receive: Receive, send: Send) -> None:
    await begin(send, 200, "application/json", (b"x-request-id", b"one"), (b"x-request-id", b"one"))
    await send({"type": "http.response.body", "body": b"{}"})


async def break_a_stream(receive: Receive, send: Send) -> None:
    await begin(send, 200, "text/event-stream; charset=utf-8")
    await send({"type": "http.response.body", "body": b"data: 1\n\ndata: 2\n\n", "more_body": True})


async def break_a_body(receive: Receive, send: Send) -> None:
    await begin(send)
    await send({"type": "http.response.body", "body": b"{", "more_body": True})


async def refuse_as_ray(receive: Receive, send: Send) -> None:
    await begin(send, 503, "text/plain")
    await send({"type": "http.response.body", "body": b"Request dropped due to backpressure"})


async def refuse_as_the_server(receive: Receive, send: Send) -> None:
    await begin(send, 503, "application/json", (b"retry-after", b"7"))
    await send({"type": "http.response.body", "body": b'{"error": {"code": "model_loading"}}'})


def ask(proxy: Proxy, path: str = "/v1/completions", messages: list[Message] = BODY) -> list[Message]:
    """What a client of the edge gets."""
    sent: list[Message] = []
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": "POST", "headers": []}
    asyncio.run(Edge(proxy)(scope, receive, send))
    return sent


def body_of(sent: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent[1:])


def test_a_request_that_was_lost_is_sent_again_with_its_whole_body() -> None:
    proxy = Proxy(lose, answer)
    sent = ask(proxy)
    assert sent[0]["status"] == 200
    assert proxy.bodies == [b'{"prompt": "a"}'] * 2


def test_it_is_not_sent_for_ever() -> None:
    proxy = Proxy(*[lose] * (ATTEMPTS + 1))
    sent = ask(proxy)
    assert len(proxy.bodies) == ATTEMPTS
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert json.loads(body_of(sent))["error"]["code"] == "replica_lost"


def test_an_answer_that_has_begun_is_never_begun_again() -> None:
    for part in (break_a_stream, break_a_body, answer):
        proxy = Proxy(part, answer)
        ask(proxy)
        assert len(proxy.bodies) == 1


def test_a_long_body_is_not_kept() -> None:
    proxy = Proxy(lose, answer)
    half = b"x" * (MAX_KEPT // 2 + 1)
    sent = ask(proxy, messages=[{"type": "http.request", "body": half, "more_body": True},
                                {"type": "http.request", "body": half, "more_body": False}])  # fmt: skip
    assert proxy.bodies == [half * 2]
    assert sent[0]["status"] == 503


def test_a_client_that_left_is_sent_nothing_and_nothing_again() -> None:
    async def wait_for_the_client(receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"

    proxy = Proxy(wait_for_the_client, answer)
    assert ask(proxy) == []
    assert len(proxy.bodies) == 1


@pytest.mark.parametrize(
    ("path", "first_line"),
    [("/v1/completions", b"data: "), ("/v1/messages", b"event: error\n"), ("/v1/responses", b"event: error\n")],
)
def test_a_stream_that_breaks_ends_with_an_error_of_its_api(path: str, first_line: bytes) -> None:
    sent = ask(Proxy(break_a_stream), path)
    assert not sent[-1]["more_body"]
    assert sent[-1]["body"].startswith(first_line)
    data: dict[str, Any] = json.loads(sent[-1]["body"].split(b"data: ")[1])
    assert data["error"]["code"] == "replica_lost"
    assert data.get("sequence_number", 2) == 2  # two events before it
    assert b"[DONE]" not in body_of(sent)


def test_a_body_that_breaks_stays_broken() -> None:
    assert body_of(ask(Proxy(break_a_body))) == b"{"


def test_a_refusal_of_rays_own_gets_the_error_body_of_all_others() -> None:
    sent = ask(Proxy(refuse_as_ray))
    assert sent[0]["status"] == 503
    assert json.loads(body_of(sent))["error"]["code"] == "queue_full"
    assert json.loads(body_of(ask(Proxy(refuse_as_the_server))))["error"]["code"] == "model_loading"


def test_the_request_id_is_sent_once() -> None:
    headers = [value for name, value in ask(Proxy(answer))[0]["headers"] if name.lower() == b"x-request-id"]
    assert headers == [b"one"]


def test_it_brings_no_engine_into_the_proxy() -> None:
    code = "import sys, server.ray_edge; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_server_itself_imports_nothing_of_ray() -> None:
    code = "import sys, server.cli; print([m for m in sys.modules if m.split('.')[0] == 'ray' or '.ray_' in m])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
