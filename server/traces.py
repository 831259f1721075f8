"""Traces to an OpenTelemetry collector, OTLP over HTTP with protobuf: a bounded queue and one thread behind it.

Not what a span says (`server.spans`). A request costs one put into the queue; spans are made and sent by the thread.
The SDK's own batch processor is not used: it makes spans where requests are served, and logs every batch that fails. A
collector that is dead, slow or hostile costs its spans and one line of log every ten minutes, and nothing else. Needs
the extra `otel`; imported only where a collector is given.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from requests import RequestException, Response, Session

from server.api.access_log import PROBES
from server.api.docs import package_version
from server.api.record import RequestRecord
from server.progress import STARTING, Status
from server.spans import make_request_spans, make_start_up_spans

logger = logging.getLogger(__name__)

EXPORT_LOGGER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
MAX_QUEUED = 2048  # requests that wait to be sent; more are not traced
MAX_BATCH = 256  # requests in one message
EVERY_S = 1.0  # between messages
CLOSE_S = 1.5  # what is left gets this long when the server ends
SILENCE_S = 600.0  # between two lines about a collector that does not take traces
MAX_REASON_CHARS = 200


class Traces:
    """Takes the record of each request that has ended, between `start` and `close`."""

    def __init__(self, endpoint: str, status: Callable[[], Status]) -> None:
        """`status` is asked until the start-up has ended. Raises ValueError for what OTEL_* variables say wrongly."""
        self._where = urlsplit(endpoint).netloc.rpartition("@")[2]  # a password stays out of the log
        self._status: Callable[[], Status] | None = status
        self._last_words = _LastWords()
        session = Session()
        session.stream = True  # the body of an answer is not read: a hostile collector could send gigabytes
        session.hooks["response"].append(_refuse_redirect)  # the exporter would count it as taken
        self._exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), session=session)
        self._made = _Made()
        provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        provider.add_span_processor(self._made)
        self._tracer = provider.get_tracer("spq-serve", package_version())
        self._records: queue.Queue[RequestRecord] = queue.Queue(MAX_QUEUED)
        self._num_lost = 0
        self._said_s: float | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def __call__(self, record: RequestRecord) -> None:
        """A request has ended. Probes are not traced."""
        if record.path in PROBES:
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._lose(1, "it is too slow")

    def close(self) -> None:
        """Send what is left; returns after `CLOSE_S` at the latest, whatever the collector does."""
        self._closing.set()
        self._thread.join(CLOSE_S)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        while records := self._take():
            self._num_lost += len(records)
        if self._num_lost:
            logger.warning("traces of %d requests were not sent to %s", self._num_lost, self._where)

    def _run(self) -> None:
        exporters = logging.getLogger(EXPORT_LOGGER)
        exporters.addFilter(self._last_words)
        try:
            self._send_until_closed()
        finally:
            exporters.removeFilter(self._last_words)

    def _send_until_closed(self) -> None:
        done = False
        while not done:
            done = self._closing.wait(EVERY_S)
            status = None if self._status is None else self._status()
            if status is not None and status.phase not in STARTING:
                self._status = None
                self._send(0, partial(make_start_up_spans, status, self._tracer))
            while records := self._take():
                self._send(len(records), partial(self._make_spans, records))

    def _take(self) -> list[RequestRecord]:
        records: list[RequestRecord] = []
        try:
            while len(records) < MAX_BATCH:
                records.append(self._records.get_nowait())
        except queue.Empty:
            return records
        return records

    def _make_spans(self, records: Sequence[RequestRecord]) -> None:
        for record in records:
            make_request_spans(record, self._tracer)

    def _send(self, num_requests: int, make: Callable[[], None]) -> None:
        """Make spans and send them; whatever is wrong with them must not end the thread."""
        try:
            make()
            spans = self._made.take()
            if spans and self._exporter.export(spans) is not SpanExportResult.SUCCESS:
                self._lose(num_requests, self._last_words.text)
        except Exception as error:
            self._made.take()
            self._lose(num_requests, f"{type(error).__name__}: {error}")

    def _lose(self, count: int, reason: str) -> None:
        """Count requests whose traces are lost, and say so now and then."""
        self._num_lost += count
        now = time.monotonic()
        if self._said_s is None or now - self._said_s > SILENCE_S:
            self._said_s = now
            shown = ascii(reason[:MAX_REASON_CHARS])[1:-1]
            logger.warning("%s does not take traces (%s); requests go on without them", self._where, shown)


class _Made(SpanProcessor):
    """Collects the spans that ended, on the one thread that makes them."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        """Keep it where it is sampled."""
        if span.context is not None and span.context.trace_flags.sampled:
            self._spans.append(span)

    def take(self) -> list[ReadableSpan]:
        """All since the last call."""
        spans, self._spans = self._spans, []
        return spans


class _LastWords(logging.Filter):
    """Keeps the exporter's last message, and all of its messages out of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop it."""
        self.text = record.getMessage()
        return False


def traces_url(endpoint: str) -> str:
    """Where traces go: the endpoint itself, with OTLP's path /v1/traces where it has none."""
    parts = urlsplit(endpoint)
    return urlunsplit(parts._replace(path="/v1/traces")) if parts.path in ("", "/") else endpoint


def _refuse_redirect(answer: Response, *_: Any, **__: Any) -> None:
    if answer.is_redirect:
        raise RequestException(f"it redirects, with status {answer.status_code}, which is not followed")


def _resource() -> Resource:
    """Who sends: spq-serve, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say another name."""
    found = Resource.create()
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: "spq-serve"}))
    return Resource({SERVICE_VERSION: package_version()}).merge(found)
