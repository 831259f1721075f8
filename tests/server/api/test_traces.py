"""OpenTelemetry traces, as a collector receives them; and that one which misbehaves costs nothing but its spans."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli import read_config
from server.core import FinishReason

sys.path.insert(0, str(Path(__file__).parent))
from collector import Collector, collect, wait_for

SERVER, INTERNAL = 2, 1  # kinds of spans, by their numbers in OTLP
UNSET, ERROR = 0, 2
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setattr("server.traces.EVERY_S", 0.02)
    with collect() as found:
        yield found


@pytest.fixture
def traced(make_bench: Any, collector: Collector) -> Any:
    return make_bench(otlp_endpoint=collector.url)


def leave(bench: Any) -> float:
    """Ends the app; seconds it took."""
    started = time.monotonic()
    bench.client.__exit__(None, None, None)
    bench.client.__enter__ = lambda: None
    bench.client.__exit__ = lambda *_: None
    return time.monotonic() - started


def test_a_completion_is_a_span_with_its_phases(traced: Any, collector: Collector) -> None:
    traced.script.num_cached, traced.script.delay_s = 2, 0.004
    before = time.time_ns()
    body = {"model": "org/alias", "prompt": "a secret", "n": 2, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9}
    answer = traced.post("/v1/completions", body, headers={"X-Request-Id": "mine"}).json()
    after = time.time_ns()
    wait_for(lambda: collector.named("/v1/completions"))
    [span] = collector.named("/v1/completions")
    assert span.kind == SERVER and span.parent_id == "" and span.status == (UNSET, "")
    assert before <= span.start_ns < span.end_ns <= after + 1_000_000
    children = {name: collector.named(name)[0] for name in ("queue", "prefill", "decode")}
    assert all(c.parent_id == span.span_id and c.trace_id == span.trace_id for c in children.values())
    assert all(c.kind == INTERNAL for c in children.values())
    edges = [children[name].start_ns for name in children] + [children["decode"].end_ns]
    assert span.start_ns <= edges[0] and edges == sorted(edges) and edges[-1] <= span.end_ns
    assert children["decode"].end_ns - children["decode"].start_ns > 12_000_000
    latencies = {k: v for k, v in span.attributes.items() if k.startswith("gen_ai.latency.")}
    assert span.attributes.keys() - latencies.keys() and set(latencies) == {
        f"gen_ai.latency.{name}"
        for name in ("e2e", "time_in_queue", "time_to_first_token", "time_in_model_prefill", "time_in_model_decode",
                     "time_in_model_inference")
    }  # fmt: skip
    assert 0.012 < latencies["gen_ai.latency.time_in_model_decode"] < latencies["gen_ai.latency.e2e"] < 10
    assert {k: v for k, v in span.attributes.items() if k not in latencies} == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.id": "mine",
        "gen_ai.request.model": "org/alias",
        "gen_ai.response.model": "org/alias",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.prompt_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.completion_tokens": 10,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.usage.cached_tokens": 2,
    }
    assert "secret" not in str(collector.spans) and traced.script.text not in str(collector.spans)


def test_the_clients_span_is_the_parent_and_its_flag_counts(traced: Any, collector: Collector) -> None:
    def chat(traceparent: str) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "say"}], "stream": True}
        headers = {"traceparent": traceparent, "tracestate": "vendor=1"}
        assert traced.post("/v1/chat/completions", body, headers=headers).status_code == 200

    chat(f"00-{TRACE}-{PARENT}-00")  # not sampled
    chat(f"00-{TRACE}-{PARENT}-01")
    chat("00-" + "0" * 32 + "-nonsense-01")
    wait_for(lambda: len(collector.named("/v1/chat/completions")) == 2)
    child, orphan = collector.named("/v1/chat/completions")
    assert (child.trace_id, child.parent_id) == (TRACE, PARENT)
    assert orphan.parent_id == "" and orphan.trace_id not in (TRACE, "0" * 32)
    assert len(collector.named("decode")) == 2


def test_errors_have_their_type(traced: Any, collector: Collector) -> None:
    traced.complete(temperature=-1)
    traced.client.get("/nothing/here")
    traced.script.end = FinishReason.ERROR
    traced.complete()
    traced.complete(stream=True)
    wait_for(lambda: len(collector.named("/v1/completions")) == 3 and collector.named("unmatched"))
    wrong, failed, cut = collector.named("/v1/completions")
    assert wrong.status == (UNSET, "") and wrong.attributes["http.response.status_code"] == 400
    assert wrong.attributes["error.type"] and "gen_ai.response.id" not in wrong.attributes
    assert failed.status == cut.status == (ERROR, "engine_error")
    assert (failed.attributes["http.response.status_code"], cut.attributes["http.response.status_code"]) == (500, 200)
    assert failed.attributes["error.type"] == cut.attributes["error.type"] == "engine_error"
    [unknown] = collector.named("unmatched")
    assert unknown.attributes["error.type"] == "not_found" and "here" not in str(unknown)


def test_a_client_that_leaves(traced: Any, collector: Collector, serve: Any) -> None:
    traced.script.text, traced.script.delay_s = "x" * 1000, 0.01
    body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 150}
    with httpx.stream("POST", f"http://{serve(traced)}/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_for(lambda: collector.named("/v1/completions"))
    [span] = collector.named("/v1/completions")
    assert span.attributes["gen_ai.response.finish_reasons"] == ["abort"] and span.status == (UNSET, "")
    assert 0 < span.attributes["gen_ai.usage.completion_tokens"] < 150
    traced.script.hold = True
    with pytest.raises(httpx.ReadTimeout):
        traced_url = f"http://{serve(traced)}/v1/completions"
        httpx.post(traced_url, json={"model": "tiny", "prompt": "x"}, timeout=0.3)
    wait_for(lambda: len(collector.named("/v1/completions")) == 2)
    span = collector.named("/v1/completions")[1]
    assert span.attributes["http.response.status_code"] == 499
    [waited] = [s for s in collector.named("queue") if s.parent_id == span.span_id]
    assert waited.end_ns == span.end_ns, "a phase that was cut off ends with the request"
    assert not [s for s in collector.named("prefill") if s.parent_id == span.span_id]


def test_embeddings_and_other_routes(traced: Any, collector: Collector) -> None:
    traced.post("/v1/embeddings", {"model": "tiny", "input": "four"})
    traced.client.get("/v1/models/tiny")
    for probe in ("/health", "/ready", "/metrics"):
        traced.client.get(probe)
    wait_for(lambda: collector.named("/v1/embeddings") and collector.named("/v1/models/{model_id:path}"))
    [span] = collector.named("/v1/embeddings")
    assert span.attributes["gen_ai.operation.name"] == "embeddings"
    assert span.attributes["gen_ai.usage.prompt_tokens"] == 4
    assert {s.name for s in collector.spans} == {
        "/v1/embeddings", "/v1/models/{model_id:path}", "start-up", "loading"
    }  # fmt: skip


def test_the_start_up_is_a_trace(traced: Any, collector: Collector) -> None:
    wait_for(lambda: collector.named("start-up"))
    [root], [loading] = collector.named("start-up"), collector.named("loading")
    assert loading.parent_id == root.span_id and root.parent_id == ""
    assert loading.end_ns - loading.start_ns == pytest.approx(2e9, abs=1e6)


def test_what_the_environment_says_is_heeded(
    make_bench: Any, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=abc")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    bench = make_bench(otlp_endpoint=collector.url + "/custom/path")
    bench.complete()
    bench.post("/v1/completions", {"model": "tiny", "prompt": "x"}, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    wait_for(lambda: collector.spans)
    assert leave(bench) < 2
    assert {span.trace_id for span in collector.spans} == {TRACE}
    assert collector.resource["deployment.environment"] == "test"
    assert collector.resource["service.name"] == "spq-serve" and collector.resource["service.version"]
    [(path, headers)] = collector.requests
    assert path == "/custom/path" and headers["x-token"] == "abc"
    assert headers["content-type"] == "application/x-protobuf"


def test_what_is_left_is_sent_at_the_end(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.traces.EVERY_S", 3600)
    with collect() as collector:
        bench = make_bench(otlp_endpoint=collector.url)
        for _ in range(3):
            bench.complete()
        assert collector.spans == []
        assert leave(bench) < 2
        assert len(collector.named("/v1/completions")) == 3


@pytest.mark.parametrize("manner", ["dead", "refuse", "busy", "hang", "flood", "redirect"])
def test_a_collector_that_misbehaves_costs_one_line(
    make_bench: Any, collector: Collector, caplog: Any, monkeypatch: pytest.MonkeyPatch, manner: Any
) -> None:
    monkeypatch.setattr("server.traces.MAX_QUEUED", 8)
    caplog.set_level(logging.INFO)
    collector.manner = manner
    bench = make_bench(otlp_endpoint="http://user:hush@127.0.0.1:1" if manner == "dead" else collector.url)
    for _ in range(12):
        assert bench.complete().status_code == 200
        time.sleep(0.03)
    assert leave(bench) < 2.5
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    said = [line for line in lines if "does not take traces" in line]
    assert len(said) <= 1 and len(lines) <= 2, lines
    assert said or manner == "flood", "a lost trace was not mentioned"
    assert "hush" not in caplog.text and "\x1b" not in caplog.text
    assert ("GET /elsewhere", {}) not in collector.requests, "it went where the collector sent it"


def test_a_wrong_endpoint_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("localhost:4318", "ftp://x", "http://", "http://a b"):
        with pytest.raises(SystemExit) as stop:
            read_config(["--model", "m", "--otlp-endpoint", wrong], {})
        assert stop.value.code == 2 and "--otlp-endpoint" in capsys.readouterr().err


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_nothing_is_imported_without_the_option_and_the_remedy_is_said_with_it() -> None:
    code = """
import sys
from server.cli import main
sys.modules["opentelemetry.sdk.trace"] = None  # as where it is not installed
main(["--model", "m", "--port", "0", "--otlp-endpoint", "http://127.0.0.1:4318"])
"""
    done = run(code)
    assert done.returncode == 2
    assert "pip install 'spq-serve[otel]'" in done.stderr and "Traceback" not in done.stderr
    code = """
import json, sys
from server.app import create_app
from server.config import ServerConfig
from server.service import Service
create_app(Service(ServerConfig(model="m")))
print(json.dumps([name for name in sys.modules if name.startswith("opentelemetry.sdk")]))
"""
    done = run(code)
    assert json.loads(done.stdout) == [], done.stderr


def test_the_web_framework_sends_nothing_by_itself(make_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    assert trace.get_tracer_provider() is provider
    bench = make_bench()
    bench.complete()
    bench.complete(temperature="a secret")
    assert kept.get_finished_spans() == ()
