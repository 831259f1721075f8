"""A little OTLP collector on a socket: it keeps the spans that it decodes, or misbehaves as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Manner = Literal["take", "refuse", "busy", "hang", "flood", "redirect"]


@dataclass
class Span:
    """One span as it came over the wire."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start_ns: int
    end_ns: int
    status: tuple[int, str]
    attributes: dict[str, Any]


@dataclass
class Collector:
    """What arrived, and how it answers."""

    url: str = ""
    manner: Manner = "take"
    spans: list[Span] = field(default_factory=list)
    resource: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path and headers

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def take(self, body: bytes) -> None:
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = {a.key: _value(a.value) for a in group.resource.attributes}
            for scope in group.scope_spans:
                self.spans += map(_span, scope.spans)


def _span(raw: Any) -> Span:
    attributes = {a.key: _value(a.value) for a in raw.attributes}
    ids = raw.trace_id.hex(), raw.span_id.hex(), raw.parent_span_id.hex()
    times = raw.start_time_unix_nano, raw.end_time_unix_nano
    return Span(raw.name, *ids, raw.kind, *times, (raw.status.code, raw.status.message), attributes)


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def collect() -> Iterator[Collector]:
    """A collector on a free port."""
    collector = Collector()
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            collector.requests.append((f"GET {self.path}", {}))
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            if collector.manner == "hang":
                over.wait(30)
                return
            if collector.manner == "take":
                collector.take(body)
            self.send_response(
                {"refuse": 400, "busy": 503, "redirect": 302}.get(collector.manner, 200), "so\x1b[31mred"
            )
            if collector.manner == "redirect":
                self.send_header("Location", collector.url + "/elsewhere")
            if collector.manner == "busy":
                self.send_header("Retry-After", "86400")
            self.end_headers()
            while collector.manner == "flood" and not over.is_set():
                try:
                    self.wfile.write(b"x" * 1_000_000)
                except OSError:
                    return

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def wait_for(condition: Any, timeout_s: float = 5.0) -> None:
    """Until another thread has made it true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
