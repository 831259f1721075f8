"""The record of a request as OpenTelemetry spans: one for the request, one each for queue, prefill and decode.

Not their export (`server.traces`), and nothing of prompts, answers or keys. Spans are made once the request has ended,
from the times in its record. Names follow the semantic conventions for HTTP and GenAI; `gen_ai.latency.*` and
`gen_ai.usage.prompt_tokens`, `completion_tokens` and `num_sequences` are vLLM's (`vllm/tracing`), in seconds as there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.api.record import Phases, RequestRecord
from server.progress import Status as ServiceStatus

Attributes = dict[str, str | int | float | list[str]]

OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
}


def make_request_spans(record: RequestRecord, tracer: Tracer) -> None:
    """Start and end the spans of a request that has ended; none where its parent, or the sampler, says so."""
    attributes = attributes_of(record)
    context = _context_of(record)
    wall_ns = _clock()
    start = wall_ns(record.started_s)
    span = tracer.start_span(record.route, context, SpanKind.SERVER, attributes, start_time=start)
    if not span.is_recording():
        return
    if record.error is not None and not 400 <= record.status < 500:  # 4xx is the client's: unset, by the conventions
        span.set_status(Status(StatusCode.ERROR, record.error))
    if record.phases is not None:
        inside = set_span_in_context(span, context)
        for name, begun, ended in _steps(record.phases, record.ended_s):
            step = tracer.start_span(name, inside, SpanKind.INTERNAL, start_time=wall_ns(begun))
            step.end(wall_ns(ended))
    span.end(wall_ns(record.ended_s))


def make_start_up_spans(status: ServiceStatus, tracer: Tracer) -> None:
    """One span for the start-up, one for each of its phases, which followed one another."""
    wall_ns = _clock()
    begun = time.monotonic() - status.elapsed_s
    root = tracer.start_span("start-up", Context(), SpanKind.INTERNAL, start_time=wall_ns(begun))
    if status.error is not None:
        root.set_status(Status(StatusCode.ERROR, status.phase))
    for phase, seconds in status.phase_seconds.items():
        span = tracer.start_span(phase, set_span_in_context(root), SpanKind.INTERNAL, start_time=wall_ns(begun))
        begun += seconds
        span.end(wall_ns(begun))
    root.end(wall_ns(begun))


def attributes_of(record: RequestRecord) -> Attributes:
    """What a request's span says beside its times."""
    found: Attributes = {
        "http.request.method": record.method,
        "http.route": record.route,
        "gen_ai.request.id": record.request_id,
    }
    if record.status:
        found["http.response.status_code"] = record.status
    if record.error is not None:
        found["error.type"] = record.error
    if record.route in OPERATIONS:
        found["gen_ai.operation.name"] = OPERATIONS[record.route]
    if record.model is not None:
        found |= {"gen_ai.request.model": record.model, "gen_ai.response.model": record.model}
    asked = record.asked
    if asked is not None:
        found |= {
            "gen_ai.request.n": asked.n,
            "gen_ai.request.max_tokens": asked.max_tokens,
            "gen_ai.request.temperature": asked.temperature,
            "gen_ai.request.top_p": asked.top_p,
            "gen_ai.response.id": asked.response_id,
            "gen_ai.response.finish_reasons": list(record.finish_reasons),
            "gen_ai.usage.num_sequences": asked.num_sequences,
        }
    if asked is not None or record.prompt_tokens:
        found |= {
            "gen_ai.usage.prompt_tokens": record.prompt_tokens,
            "gen_ai.usage.completion_tokens": record.completion_tokens,
            "gen_ai.usage.input_tokens": record.prompt_tokens,  # the conventions' names for the same
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "gen_ai.usage.cached_tokens": record.cached_tokens,
            "gen_ai.latency.e2e": record.ended_s - record.started_s,
        }
    return found if record.phases is None else found | _latencies(record.phases)


def _latencies(phases: Phases) -> Attributes:
    queue, prefill, decode = phases.queue_s, phases.prefill_s, phases.decode_s
    first = None if phases.first_token_s is None else phases.first_token_s - phases.arrived_s
    inference = None if prefill is None or decode is None else prefill + decode
    found = {
        "time_in_queue": queue,
        "time_to_first_token": first,
        "time_in_model_prefill": prefill,
        "time_in_model_decode": decode,
        "time_in_model_inference": inference,
    }
    return {f"gen_ai.latency.{name}": seconds for name, seconds in found.items() if seconds is not None}


def _steps(phases: Phases, ended_s: float) -> Iterator[tuple[str, float, float]]:
    """(name, begin, end) of each phase that was reached; one that was cut off ends with the request."""
    marks = (phases.arrived_s, phases.scheduled_s, phases.first_token_s, phases.last_token_s)
    for i, name in enumerate(("queue", "prefill", "decode")):
        begun, ended = marks[i], marks[i + 1]
        if begun is None:
            return
        yield name, begun, max(begun, ended_s if ended is None else ended)


def _context_of(record: RequestRecord) -> Context:
    """The client's span as W3C Trace Context has it; empty where there is none, or one that cannot be read."""
    carrier = {"traceparent": record.traceparent or "", "tracestate": record.tracestate or ""}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _clock() -> Callable[[float], int]:
    """Monotonic seconds to nanoseconds since the epoch, as the two clocks stand now."""
    ahead = time.time_ns() - time.monotonic_ns()
    return lambda monotonic_s: ahead + int(monotonic_s * 1e9)
