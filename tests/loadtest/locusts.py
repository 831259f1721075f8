"""locust in a process of its own, as a user runs it (it patches sockets, so never here), and a server with a script."""

from __future__ import annotations

import csv
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Run:
    """What a run left behind."""

    status: int
    stats: dict[tuple[str, str], dict[str, Any]]  # rows of locust's table by type and name
    failures: list[dict[str, str]]
    summary: dict[str, Any]
    log: str

    def count(self, type_: str, name: str) -> int:
        row = self.stats.get((type_, name))
        return int(row["num_requests"]) if row else 0

    def lowest_ms(self, type_: str, name: str) -> float:
        return float(self.stats[type_, name]["min_response_time"])

    def mean_ms(self, type_: str, name: str) -> float:
        row = self.stats[type_, name]
        return float(row["total_response_time"] / row["num_requests"])


def command(host: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--host", host, *arguments]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("LOCUST_", "LOADTEST_"))}


def run(folder: Path, host: str, *arguments: str, **env: str) -> Run:
    """Headless, to the end."""
    prefix = str(folder / "run")
    flags = ("--headless", "--json", "--csv", prefix, "--stop-timeout", "5", *arguments)
    done = subprocess.run(
        command(host, *flags), cwd=ROOT, env=environment() | env, capture_output=True, text=True, timeout=120
    )
    # the files of --csv lack the last second
    rows = {(row["method"], row["name"]): row for row in json.loads(done.stdout)}
    summary = re.search(r"summary (\{.*\})", done.stderr)
    return Run(
        done.returncode, rows, _rows(f"{prefix}_failures.csv"), json.loads(summary[1]) if summary else {}, done.stderr
    )


def _rows(path: str) -> list[dict[str, str]]:
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


TTFT_S, GAP_S, PIECES = 0.12, 0.04, 5


@dataclass(slots=True)
class Script:
    """What the server does with the next requests: 200, a status to refuse with, "error" or "cut"; then 200."""

    steps: list[int | str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    owner: str = "someone"


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    script: Script


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        known = {"/v1/models": {"data": [{"id": "scripted", "owned_by": self.server.script.owner}]}, "/health": {}}
        self._json(200 if self.path in known else 404, known.get(self.path, {}))

    def do_POST(self) -> None:
        script = self.server.script
        script.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        script.times.append(time.monotonic())
        step = script.steps.pop(0) if script.steps else 200
        if isinstance(step, int) and step != 200:
            self._json(step, {"error": {"message": f"scripted {step}", "type": "x", "code": None}})
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()  # headers long before the first token
        chat = "chat" in self.path
        for index in range(PIECES):
            time.sleep(GAP_S if index else TTFT_S)
            text = {"delta": {"content": " x"}} if chat else {"text": " x"}
            self._event({"choices": [{"index": 0, **text, "finish_reason": None}]})
            if index == 1 and step == "error":
                self._event({"error": {"message": "out of pages"}})
                return
            if index == 1 and step == "cut":
                return
        self._event({"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "length"}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": PIECES}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def scripted(*steps: int | str, owner: str = "someone") -> Iterator[tuple[str, Script]]:
    """The server's address, and its script with what it was asked."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.script = Script(list(steps), owner=owner)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", server.script
        finally:
            server.shutdown()
            thread.join()
