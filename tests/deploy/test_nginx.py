"""deploy/nginx.conf: its directives, and what a real nginx does with it between a client and two servers of ours."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.deploy.recipe import ROOT

FILE = ROOT / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def test_every_directive_is_known_and_in_its_place() -> None:
    crossplane = pytest.importorskip("crossplane")
    parsed = crossplane.parse(str(FILE), strict=True)
    assert parsed["status"] == "ok", parsed["errors"]


class Replica(ThreadingHTTPServer):
    """A stand-in for a server: answers as told by `behaviour`, and notes what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.behaviour = "answer"
        self.go_on = threading.Event()
        self.go_on.set()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Replica

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.server.behaviour == "full":
            return self.answer(503, b'{"error": "full"}', ("Retry-After", "7"))
        if self.server.behaviour == "break off":
            self.close_connection = True
            return None
        if self.server.behaviour == "break the stream":
            self.begin()
            self.close_connection = True
            return None
        if self.path.endswith("stream"):
            self.begin()
            self.server.go_on.wait(10)
            self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")
            return None
        self.server.go_on.wait(10)
        return self.answer(200, json.dumps(self.server.server_port).encode())

    do_GET = do_POST

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nfirst\r\n")
        self.wfile.flush()

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, text in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def balanced(tmp_path: Path) -> Iterator[tuple[int, Replica, Replica]]:
    """nginx with the project's file, but for addresses and folders: its port, and the two behind it."""
    if NGINX is None:
        pytest.skip("no nginx")
    replicas = (Replica(), Replica())
    port = free_port()
    text = FILE.read_text("utf-8").replace("/tmp/", f"{tmp_path}/").replace("listen 8080", f"listen 127.0.0.1:{port}")
    text = text.replace("worker_processes auto", "daemon off;\nworker_processes 1")  # least_conn counts per worker
    for number, replica in enumerate(replicas):
        threading.Thread(target=replica.serve_forever, daemon=True).start()
        text = text.replace(f"spq-replica-{number}:8000", f"127.0.0.1:{replica.server_port}")
    (tmp_path / "nginx.conf").write_text(text)
    os.chmod(tmp_path, 0o777)  # as root, nginx's worker is another user
    process = subprocess.Popen([NGINX, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "error.log"])
    deadline = time.monotonic() + 20
    while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
        assert process.poll() is None, (tmp_path / "error.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield port, *replicas
    process.terminate()
    process.wait(timeout=20)
    for replica in replicas:
        replica.go_on.set()
        replica.shutdown()
        replica.server_close()


def ask(port: int, path: str = "/v1/completions") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, b"{}")
    return connection.getresponse()


Balanced = tuple[int, Replica, Replica]


def test_a_chunk_comes_before_the_next_is_made(balanced: Balanced) -> None:
    port, one, two = balanced
    one.go_on.clear()
    two.go_on.clear()
    answer = ask(port, "/stream")
    assert answer.read(5) == b"first"
    one.go_on.set()
    two.go_on.set()
    assert answer.read() == b"second"


def test_the_server_with_fewer_requests_gets_the_next(balanced: Balanced) -> None:
    port, one, two = balanced
    one.go_on.clear()
    earlier = len(one.asked) + len(two.asked)
    waiting = [threading.Thread(target=ask, args=(port,), daemon=True) for _ in range(2)]
    for thread in waiting:  # one of the two hangs at `one`
        thread.start()
    deadline = time.monotonic() + 10
    while len(one.asked) + len(two.asked) < earlier + 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    before = len(two.asked)
    assert [json.loads(ask(port).read()) for _ in range(6)] == [two.server_port] * 6
    assert (len(one.asked), len(two.asked) - before) == (1, 6)
    one.go_on.set()
    for thread in waiting:
        thread.join(timeout=20)


def test_what_a_full_server_refuses_goes_to_the_other(balanced: Balanced) -> None:
    port, one, two = balanced
    one.behaviour = "full"
    assert [json.loads(ask(port).read()) for _ in range(4)] == [two.server_port] * 4
    two.behaviour = "full"
    refused = ask(port)
    assert (refused.status, refused.getheader("Retry-After"), refused.read()) == (503, "7", b'{"error": "full"}')
    two.behaviour = one.behaviour = "answer"
    assert ask(port).status == 200, "a refusal takes no server out"


@pytest.mark.parametrize("how", ["break off", "gone"])
def test_a_request_that_got_no_answer_is_tried_at_the_other(balanced: Balanced, how: str) -> None:
    port, one, two = balanced
    if how == "gone":
        one.shutdown()
        one.server_close()
    one.behaviour = how
    assert [json.loads(ask(port).read()) for _ in range(4)] == [two.server_port] * 4


def test_a_stream_that_has_begun_is_never_tried_again(balanced: Balanced) -> None:
    port, one, two = balanced
    one.behaviour = two.behaviour = "break the stream"
    with pytest.raises(http.client.IncompleteRead):
        ask(port, "/stream").read()
    assert len(one.asked) + len(two.asked) == 1


def test_stored_responses_stay_with_one_server(balanced: Balanced) -> None:
    port, *_ = balanced
    assert len({ask(port, "/v1/responses").read() for _ in range(6)}) == 1


@pytest.mark.parametrize("path", ["/metrics", "/admin/drain"])
def test_what_is_about_one_server_is_not_balanced(balanced: Balanced, path: str) -> None:
    port, one, two = balanced
    assert ask(port, path).status == 404
    assert one.asked == two.asked == []
