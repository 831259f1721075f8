"""Behind a real uvicorn: clients that leave, requests that stop half way, bodies that are too large."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def request_bytes(body: dict[str, Any], *, path: str = "/v1/completions") -> bytes:
    data = json.dumps({"model": "tiny", "prompt": "say", **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    got = b""
    while mark not in got:
        piece = connection.recv(65536)
        assert piece, got
        got += piece
    return got


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_aborts_its_answers(bench: Any, serve: Any, eventually: Any, n: int) -> None:
    bench.script.text, bench.script.delay_s = "x" * 10_000, 0.01
    address = serve(bench)
    with connect(address) as connection:
        connection.sendall(request_bytes({"stream": True, "n": n, "max_tokens": 150}))
        read_until(connection, b'"text":"x"')
        assert len(bench.engine.live) == n
    assert eventually(lambda: not bench.engine.live)
    assert all(generation.aborted for generation in bench.engine.generations)
    assert eventually(lambda: bench.metric("vllm:request_success_total", finished_reason="abort") == n)
    assert 0 < bench.metric("vllm:generation_tokens_total") < 150 * n


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_token_aborts(
    bench: Any, serve: Any, eventually: Any, stream: bool, path: str
) -> None:
    bench.script.hold = True
    body = {"model": "tiny", "stream": stream, "max_tokens": 9}
    body |= {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    address = serve(bench)
    with connect(address) as connection:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        assert eventually(lambda: len(bench.engine.live) == 1)
    assert eventually(lambda: not bench.engine.live)
    assert bench.engine.generations[0].aborted
    assert eventually(lambda: bench.metric("http_requests_total", status="499") == 1)
    assert bench.metric("vllm:prompt_tokens_total") == 0, "nothing was delivered"


def test_leaving_a_plain_request_in_the_middle_counts_what_was_generated(
    bench: Any, serve: Any, eventually: Any
) -> None:
    bench.script.text, bench.script.delay_s = "x" * 1000, 0.01
    address = serve(bench)
    with connect(address) as connection:
        connection.sendall(request_bytes({"max_tokens": 190}))
        assert eventually(lambda: bench.metric("vllm:generation_tokens_total") >= 3)
    assert eventually(lambda: not bench.engine.live)
    assert eventually(lambda: bench.metric("vllm:request_success_total", finished_reason="abort") == 1)
    total = bench.metric("vllm:generation_tokens_total")
    assert bench.metric("vllm:request_generation_tokens_sum") == total < 190
    assert bench.metric("vllm:prompt_tokens_total") == 3


@pytest.mark.parametrize(("missing", "seen"), [(130, 0), (60, 0), (5, 1)])
def test_half_a_request(bench: Any, serve: Any, eventually: Any, missing: int, seen: int) -> None:
    address = serve(bench)
    with connect(address) as connection:
        connection.sendall(request_bytes({"max_tokens": 5})[:-missing])
        time.sleep(0.05)
    assert eventually(lambda: bench.metric("http_requests_total", status="499") == seen)
    assert httpx.get(f"http://{address}/health").status_code == 200
    assert bench.engine.requests == []
    assert eventually(lambda: bench.metric("http_requests_total") == seen + 1), "none was answered with an error"


def test_two_requests_on_one_connection(bench: Any, serve: Any) -> None:
    with httpx.Client(base_url=f"http://{serve(bench)}") as client:
        for stream in (True, False, True):
            body = {"model": "tiny", "prompt": "x", "stream": stream}
            assert client.post("/v1/completions", json=body).status_code == 200
        assert client.head("/ready").status_code == 200
        assert client.get("/ready").json()["phase"] == "ready"


def test_fifty_megabytes(bench: Any, serve: Any) -> None:
    address = serve(bench)
    body = b'{"model": "tiny", "prompt": "' + b"x" * 50_000_000 + b'"}'
    response = httpx.post(
        f"http://{address}/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert httpx.get(f"http://{address}/health").status_code == 200


def test_fifty_megabytes_in_chunks_are_not_collected(bench: Any, serve: Any, eventually: Any) -> None:
    host, port = serve(bench).split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent = 0
    try:
        for _ in range(50):
            connection.send(b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n")
            sent += 1_000_000
        connection.send(b"0\r\n\r\n")
    except (BrokenPipeError, ConnectionResetError):
        assert sent >= 8_000_000
    try:
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "request_too_large"
    except (BrokenPipeError, ConnectionResetError):
        assert sent < 50_000_000, "the server closed the connection while the client was still sending"
    assert httpx.get(f"http://{host}:{port}/health").status_code == 200
    assert eventually(lambda: bench.metric("http_requests_total", status="413") == 1)


def test_streams_run_side_by_side(bench: Any, serve: Any) -> None:
    bench.script.text, bench.script.delay_s = "x" * 10, 0.02
    address = serve(bench)
    peak = 0
    statuses = []

    def one() -> None:
        nonlocal peak
        body = {"model": "tiny", "prompt": "x", "stream": True}
        with httpx.stream("POST", f"http://{address}/v1/completions", json=body) as response:
            for _ in response.iter_lines():
                peak = max(peak, len(bench.engine.live))
            statuses.append(response.status_code)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 8
    assert peak > 1
    assert not bench.engine.live


def test_tokens_are_sent_as_they_come(bench: Any, serve: Any) -> None:
    bench.script.text, bench.script.delay_s = "ab", 0.3
    body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 2}
    times = []
    with httpx.stream("POST", f"http://{serve(bench)}/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if '"text":"a"' in line or '"text":"b"' in line:
                times.append(time.monotonic())
    assert times[1] - times[0] > 0.2


def test_the_server_stops_with_a_stream_open(bench: Any, serve: Any) -> None:
    bench.script.text, bench.script.delay_s = "x" * 10_000, 0.01
    connection = connect(serve(bench))
    connection.sendall(request_bytes({"stream": True, "max_tokens": 190}))
    read_until(connection, b'"text":"x"')
    # the fixture now stops the server and waits for its thread
