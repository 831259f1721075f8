"""Counters equal the sums of `usage`, whatever mix of requests was served."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import EngineError

CALL = st.fixed_dictionaries(
    {
        "chat": st.booleans(),
        "stream": st.booleans(),
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 15),
        "stop": st.sampled_from([None, "lo", "world", "nothing"]),
        "logprobs": st.booleans(),
        "burst": st.sampled_from([1, 2, 30]),
    }
)


def usage_of(bench: Any, read_events: Any, call: dict[str, Any]) -> dict[str, Any]:
    body = {key: call[key] for key in ("n", "max_tokens", "stop")}
    if call["stream"]:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if call["logprobs"]:
        body["logprobs"] = True if call["chat"] else 1
    bench.script.burst = call["burst"]
    response = bench.chat(**body) if call["chat"] else bench.complete(prompt=["a", "bc"], **body)
    usage: dict[str, Any] = read_events(response)[-2]["usage"] if call["stream"] else response.json()["usage"]
    return usage


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CALL, min_size=1, max_size=4))
def test_counters_equal_the_sums_of_usage(make_bench: Any, read_events: Any, calls: list[dict[str, Any]]) -> None:
    bench = make_bench()
    bench.script.num_cached = 1
    usages = [usage_of(bench, read_events, call) for call in calls]
    sequences = sum(call["n"] * (1 if call["chat"] else 2) for call in calls)
    metric = bench.metric
    assert metric("vllm:prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)
    assert metric("vllm:generation_tokens_total") == sum(u["completion_tokens"] for u in usages)
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)
    assert metric("vllm:prompt_tokens_cached_total") == cached
    assert metric("vllm:request_generation_tokens_sum") == metric("vllm:generation_tokens_total")
    assert metric("vllm:time_to_first_token_seconds_count") == sequences
    itl = metric("vllm:inter_token_latency_seconds_count")
    assert itl == metric("vllm:generation_tokens_total") - sequences
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
                 "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
                 "request_generation_tokens"):  # fmt: skip
        assert metric(f"vllm:{name}_count") == sequences, name
    assert metric("vllm:request_success_total") == sequences
    assert metric("vllm:request_success_total", finished_reason="abort") == 0
    prompts = sum(1 if call["chat"] else 2 for call in calls)
    assert metric("vllm:request_params_n_count") == metric("vllm:request_params_max_tokens_count") == prompts
    assert metric("vllm:request_params_n_sum") == sequences


def test_a_failed_stream_counts_what_was_sent(bench: Any, read_events: Any) -> None:
    bench.script.error, bench.script.fail_after = EngineError("broke"), 4
    events = read_events(bench.complete(stream=True))
    sent = "".join(event["choices"][0]["text"] for event in events if "choices" in event)
    assert len(sent) == bench.metric("vllm:generation_tokens_total") == 4
    assert bench.metric("vllm:prompt_tokens_total") == 3
    assert bench.metric("vllm:request_success_total", finished_reason="error") == 1
    assert bench.metric("vllm:request_success_total") == 1


def test_refused_requests_count_nothing(bench: Any) -> None:
    bench.complete(temperature=9)
    bench.complete(model="other")
    for name in ("prompt_tokens_total", "generation_tokens_total", "request_success_total", "request_params_n_count"):
        assert bench.metric(f"vllm:{name}") == 0


def test_scoring_has_no_first_token(bench: Any) -> None:
    bench.complete(echo=True, max_tokens=0, logprobs=1)
    assert bench.metric("vllm:time_to_first_token_seconds_count") == 0
    assert bench.metric("vllm:prompt_tokens_total") == 3
    assert bench.metric("vllm:request_success_total", finished_reason="length") == 1


def test_rate_shows_recent_tokens(bench: Any) -> None:
    bench.complete()
    assert bench.metric("spq:generation_tokens_per_second") == 1.2
