"""Metrics: names and types as dashboards expect them, live values, and a rate that falls to zero."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from server.core import SamplingParams, Sequence, StepTimes, Timings
from server.metrics import FINISHED_REASONS, REFUSED_REASONS, Metrics, TokenRate
from server.progress import Phase
from server.tally import Tally

LABELS = {"model_name": "tiny", "engine": "0"}
GAUGES = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
          "vllm:gpu_cache_usage_perc", "vllm:cache_config_info", "spq:memory_bytes", "spq:compression_ratio",
          "spq:ranks_kept", "spq:generation_tokens_per_second", "spq:startup_seconds", "spq:ready",
          "vllm:engine_sleep_state", "spq:phase", "process_resident_memory_bytes"}  # fmt: skip
COUNTERS = {"vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prompt_tokens_cached_total",
            "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total",
            "vllm:request_success_total", "vllm:admission_rejections_total", "http_requests_total"}  # fmt: skip
HISTOGRAMS = {f"vllm:{name}" for name in (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_max_num_generation_tokens", "request_params_n",
    "request_params_max_tokens", "iteration_tokens_total")} | {"http_request_duration_seconds"}  # fmt: skip


def bound(**changes: Any) -> Metrics:
    metrics = Metrics("tiny")
    stats = SimpleNamespace(num_running=3, num_waiting=2, kv_usage=0.5, num_preemptions=7, prefix_queries=100,
                            prefix_hits=40, num_drafts=5, num_draft_tokens=20, num_accepted_tokens=12)  # fmt: skip
    info = SimpleNamespace(
        block_size=16, num_blocks=10, kv_dtype="int8", kv_tokens=160, max_model_len=80,
        ledger={"weights": 1000, "kv": 500}, compression={"ratio_to_fp16": 2.5, "mean_rank_kept": 0.4, "preset": "x"},
    )  # fmt: skip
    status = SimpleNamespace(phase="ready", accepts=True, progress=1.0, phase_seconds={"loading": 2.5})
    values = {"stats": stats, "status": status, "info": info, **changes}
    metrics.bind(**{name: (lambda value=value: value) for name, value in values.items()})
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {**LABELS, **labels})


def finished(num_prompt: int = 5) -> Sequence:
    timings = Timings(arrived_s=10.0, scheduled_s=10.5, first_token_s=11.0, finished_s=13.0)
    return Sequence("r", [1] * num_prompt, num_prompt, SamplingParams(max_tokens=9), timings)


def test_every_promised_name_is_on_the_wire_with_its_type() -> None:
    metrics = bound()
    metrics.rejected("queue_full")
    metrics.http("/v1/completions", "POST", 200, 0.1)
    lines = metrics.render().decode().splitlines()
    types = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE"))
    samples = {line.split("{")[0].split()[0] for line in lines if not line.startswith("#")}
    for names, kind in ((GAUGES, "gauge"), (COUNTERS, "counter"), (HISTOGRAMS, "histogram")):
        for name in names:
            assert types[name] == kind, name
            assert (f"{name}_count" if kind == "histogram" else name) in samples, name


def test_live_values_are_read_at_scrape_time() -> None:
    metrics = bound()
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == value(metrics, "vllm:gpu_cache_usage_perc") == 0.5
    assert value(metrics, "vllm:num_preemptions_total") == 7
    assert value(metrics, "vllm:prefix_cache_queries_total") == 100
    assert value(metrics, "vllm:spec_decode_num_drafts_total") == 5
    assert value(metrics, "vllm:spec_decode_num_draft_tokens_total") == 20
    assert value(metrics, "vllm:spec_decode_num_accepted_tokens_total") == 12
    assert value(metrics, "vllm:prefix_cache_hits_total") == 40
    assert value(metrics, "spq:memory_bytes", kind="weights") == 1000
    assert value(metrics, "spq:compression_ratio") == 2.5
    assert value(metrics, "spq:ranks_kept") == 0.4
    assert value(metrics, "spq:startup_seconds", phase="loading") == 2.5
    assert value(metrics, "spq:ready") == 1
    config = {"block_size": "16", "num_gpu_blocks": "10", "cache_dtype": "int8", "kv_cache_size_tokens": "160",
              "kv_cache_max_concurrency": "2.0"}  # fmt: skip
    assert value(metrics, "vllm:cache_config_info", **config) == 1


def test_scrape_before_anything_is_bound_or_loaded() -> None:
    assert value(Metrics("tiny"), "vllm:num_requests_running") == 0
    loading = SimpleNamespace(phase="loading", accepts=False, progress=0.25, phase_seconds={})
    metrics = bound(stats=None, info=None, status=loading)
    assert value(metrics, "vllm:num_requests_waiting") == 0
    assert value(metrics, "vllm:num_preemptions_total") == 0
    assert value(metrics, "spq:ready") == 0
    assert value(metrics, "spq:startup_progress") == 0.25
    assert value(metrics, "spq:memory_bytes", kind="weights") is None


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        ("ready", "awake"),
        ("draining", "awake"),
        ("sleeping", "discard_all"),
        ("drained", "discard_all"),
        ("loading", ""),
    ],
)
def test_states_of_sleep_have_vllms_names(phase: str, state: str) -> None:
    metrics = bound(status=SimpleNamespace(phase=phase, accepts=True, progress=1.0, phase_seconds={}))
    for name in ("awake", "weights_offloaded", "discard_all"):
        assert value(metrics, "vllm:engine_sleep_state", sleep_state=name) == float(name == state)


@pytest.mark.parametrize("phase", ["compressing", "ready", "failed"])
def test_one_phase_is_on(phase: str) -> None:
    metrics = bound(status=SimpleNamespace(phase=phase, accepts=False, progress=0.5, phase_seconds={}))
    on = {name for name in get_args(Phase) if value(metrics, "spq:phase", phase=name) == 1}
    assert on == {phase}
    assert value(metrics, "spq:phase", phase="sleeping") == 0


def test_the_first_refusal_adds_to_what_was_there() -> None:
    metrics = Metrics("tiny")
    for reason in REFUSED_REASONS:
        assert metrics.registry.get_sample_value("vllm:admission_rejections_total", refused(reason)) == 0
    metrics.rejected("queue_full")
    assert metrics.registry.get_sample_value("vllm:admission_rejections_total", refused("queue_full")) == 1


def refused(reason: str) -> dict[str, str]:
    return {"model_name": "tiny", "reason": reason}


def test_an_uncompressed_model_has_no_compression_numbers() -> None:
    info = SimpleNamespace(block_size=16, num_blocks=1, kv_dtype="x", kv_tokens=16, max_model_len=8, ledger={},
                           compression={})  # fmt: skip
    assert value(bound(info=info), "spq:compression_ratio") is None


def test_times_of_a_sequence() -> None:
    metrics = Metrics("tiny")
    metrics.sequence_ended(finished(), num_tokens=5, reason="stop", last_token_s=13.0)
    sums = {
        "e2e_request_latency_seconds": 3.0,
        "request_queue_time_seconds": 0.5,
        "request_inference_time_seconds": 2.5,
        "request_prefill_time_seconds": 0.5,
        "request_decode_time_seconds": 2.0,
        "request_time_per_output_token_seconds": 0.5,
        "request_prompt_tokens": 5.0,
        "request_generation_tokens": 5.0,
    }
    for name, expected in sums.items():
        assert value(metrics, f"vllm:{name}_sum") == pytest.approx(expected), name
    for reason in FINISHED_REASONS:
        assert value(metrics, "vllm:request_success_total", finished_reason=reason) == float(reason == "stop")


def test_a_sequence_that_never_ran_has_no_phases() -> None:
    metrics = Metrics("tiny")
    sequence = finished()
    sequence.timings = Timings(arrived_s=0.0)
    metrics.sequence_ended(sequence, num_tokens=0, reason="abort", last_token_s=None)
    assert value(metrics, "vllm:request_queue_time_seconds_count") == 0
    assert value(metrics, "vllm:request_decode_time_seconds_count") == 0
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 1


def test_short_token_times_have_buckets_of_their_own() -> None:
    metrics = Metrics("tiny")
    metrics.next_tokens(0.0015, 1)
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.001") == 0
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.002") == 1


def test_steps() -> None:
    metrics = Metrics("tiny")
    metrics.step(48, 0.02, StepTimes(schedule=0.001, prepare=0.002, run=0.012, sample=0.004, publish=0.0001))
    assert value(metrics, "vllm:iteration_tokens_total_sum") == 48
    assert value(metrics, "spq:step_seconds_sum") == pytest.approx(0.02)
    phases = {"schedule": 0.001, "prepare": 0.002, "run": 0.012, "sample": 0.004, "publish": 0.0001}
    for phase, seconds in phases.items():
        assert value(metrics, "spq:step_phase_seconds_sum", phase=phase) == pytest.approx(seconds)
        assert value(metrics, "spq:step_phase_seconds_count", phase=phase) == 1


def test_tokens_that_came_together_share_their_time() -> None:
    metrics = Metrics("tiny")
    metrics.next_tokens(0.006, 3)
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 3
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == pytest.approx(0.006)
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.002") == 3


@given(st.lists(st.floats(0, 20), max_size=30))
def test_a_tally_reads_like_a_histogram_of_the_client_library(values: list[float]) -> None:
    bounds = (0.5, 1.0, 10.0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = Tally("x_seconds", "A text.", {"a": "b"}, bounds)
    ours.register(tally)
    histogram = Histogram("x_seconds", "A text.", ("a",), registry=theirs, buckets=bounds).labels(a="b")
    for number in values:
        tally.observe(number)
        histogram.observe(number)
    created = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == created


def test_rate_is_a_ten_second_mean_and_falls_to_zero() -> None:
    now = 1000.0
    rate = TokenRate(clock=lambda: now)
    for _ in range(10):
        rate.add()
        rate.add(4)
        now += 1.0
    now -= 1.0
    assert rate.per_second() == 5.0
    now += 5.0
    assert rate.per_second() == 2.5
    now += 5.0
    assert rate.per_second() == 0.0


def test_two_metrics_do_not_share_anything() -> None:
    first, second = Metrics("tiny"), Metrics("tiny")
    first.tokens(1)
    assert value(first, "vllm:generation_tokens_total") == 1
    assert value(second, "vllm:generation_tokens_total") == 0
