"""Clients that stop in the middle, send slowly, read nothing, or are too many; and what is no HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

import httpx
import pytest

import server.connection

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = json.dumps({"model": "tiny", "prompt": "say", "max_tokens": 3}).encode()
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture
def hasty(make_bench: Any) -> Any:
    """A bench that waits 0.3 s for its clients."""
    return make_bench(client_timeout_s=0.3)


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def answer_of(connection: socket.socket) -> tuple[http.client.HTTPResponse, Any]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response, json.loads(response.read())


@pytest.mark.parametrize(
    "sent", [b"POST", HEAD, HEAD + b"Content-Length: 50\r\n\r\n", HEAD + b"Content-Length: 50\r\n\r\n{"]
)
def test_a_request_that_stops_is_answered_and_closed(hasty: Any, serve: Any, sent: bytes) -> None:
    with connect(serve(hasty)) as connection:
        connection.sendall(sent)
        response, body = answer_of(connection)
        assert response.status == 408
        assert response.getheader("Connection") == "close"
        assert body["error"]["code"] == "request_timeout"
        assert ("body" in body["error"]["message"]) == (b"\r\n\r\n" in sent)
        assert connection.recv(1) == b""
    assert hasty.metric("vllm:admission_rejections_total", reason="request_timeout") == 1
    assert not hasty.engine.requests


def test_a_connection_that_says_nothing_is_closed(hasty: Any, serve: Any) -> None:
    with connect(serve(hasty)) as connection:
        assert connection.recv(1) == b""
    assert hasty.metric("vllm:admission_rejections_total", reason="request_timeout") == 0


def test_a_head_by_drops_is_cut_off_but_a_body_by_parts_is_not(hasty: Any, serve: Any) -> None:
    address = serve(hasty)
    with connect(address) as connection:
        started = time.monotonic()
        with pytest.raises(OSError):
            for byte in HEAD:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - started < 2
    with connect(address) as connection:
        connection.sendall(WHOLE[: -len(BODY)])
        for begin in range(0, len(BODY), 10):
            time.sleep(0.1)
            connection.sendall(BODY[begin : begin + 10])
        response, body = answer_of(connection)
        assert (response.status, body["choices"][0]["text"]) == (200, "hel")


def test_waiting_for_an_answer_is_no_silence_of_the_client(hasty: Any, serve: Any) -> None:
    hasty.script.text, hasty.script.delay_s = "abc", 0.5
    with connect(serve(hasty)) as connection:
        connection.sendall(WHOLE + HEAD)  # and the next one begins, and stops
        response, body = answer_of(connection)
        assert (response.status, body["choices"][0]["text"]) == (200, "abc")
        response, body = answer_of(connection)
        assert (response.status, body["error"]["code"]) == (408, "request_timeout")


def test_who_does_not_read_an_answer_loses_it(hasty: Any, serve: Any, eventually: Any) -> None:
    hasty.script.text, hasty.script.burst = "x" * 190, 190
    address = serve(hasty)
    with connect(address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "tiny", "prompt": "say", "max_tokens": 190, "stream": True, "n": 100}).encode()
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: len(hasty.engine.generations) == 100)
        assert eventually(lambda: not hasty.engine.live)
        assert eventually(lambda: hasty.metric("http_requests_total", handler="/v1/completions") == 1)
    assert httpx.get(f"http://{address}/health").status_code == 200


def test_one_connection_too_many(bench: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.listener, "most_connections", lambda: 2)
    address = serve(bench)
    with connect(address) as first, connect(address):
        first.sendall(WHOLE)
        assert answer_of(first)[0].status == 200
        with connect(address) as third:
            response, body = answer_of(third)
            assert (response.status, body["error"]["code"]) == (503, "too_many_connections")
            assert response.getheader("Retry-After") == "5"
    assert bench.metric("vllm:admission_rejections_total", reason="too_many_connections") == 1
    assert httpx.get(f"http://{address}/health").status_code == 200


def test_connections_leave_files_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    infinity = server.connection.resource.RLIM_INFINITY
    for soft, most in ((1024, 960), (10, 1), (infinity, 1 << 30)):
        monkeypatch.setattr(server.connection.resource, "getrlimit", lambda _, soft=soft: (soft, infinity))
        assert server.connection.most_connections() == most


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"]
)
def test_what_is_no_http_gets_the_error_body(bench: Any, serve: Any, sent: bytes) -> None:
    with connect(serve(bench)) as connection:
        connection.sendall(sent)
        response, body = answer_of(connection)
        assert (response.status, body["error"]["code"]) == (400, "invalid_http")
