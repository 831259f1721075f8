"""What Prometheus sees, in one object with its own registry.

Names, labels and meanings are vLLM's wherever we have the meaning, so that its dashboards and routers work unchanged;
what vLLM lacks starts with `spq:`. Sources: what the HTTP side observes as it hands tokens out (so that counters equal
the sums of `usage`), the engine's own numbers, read at scrape time through `bind`, and the loop's step sizes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.core import SamplingParams, Sequence, StepTimes
from server.progress import Phase, Status
from server.tally import Tally

if TYPE_CHECKING:
    from server.engine.engine import EngineStats, ModelInfo

FINISHED_REASONS = ("stop", "length", "abort", "error")
# Of refusals, from the first scrape on, so that the first one is in a rate; others appear when they come.
REFUSED_REASONS = ("queue_full", "rate_limit_exceeded", "model_loading", "draining", "request_timeout")
RATE_WINDOW_S = 10
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                80.0, 160.0, 640.0, 2560.0)  # fmt: skip
# Finer below 10 ms than vLLM's: a small compressed model answers in single milliseconds.
ITL_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
               1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
                   120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COUNT_BUCKETS = (1, 2, 5, 10, 20)
PHASE_BUCKETS = (1e-5, 3e-5, 1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
PHASES = tuple(StepTimes.__slots__)  # schedule, prepare, run, sample, publish
HTTP_LABELS = ("handler", "method", "status")


class TokenRate:
    """Tokens per second over the last ten seconds; falls to 0 when nothing comes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: deque[tuple[int, int]] = deque(maxlen=RATE_WINDOW_S + 1)  # (second, tokens)

    def add(self, count: int = 1) -> None:
        """Count tokens handed out now."""
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            count += self._seconds.pop()[1]
        self._seconds.append((second, count))

    def per_second(self) -> float:
        """Mean over the window."""
        oldest = int(self._clock()) - RATE_WINDOW_S
        return sum(count for second, count in self._seconds if second > oldest) / RATE_WINDOW_S


class Metrics:
    """All collectors. The label `model_name` is the first served name."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._labels = {"model_name": model_name, "engine": "0"}
        self._rate = TokenRate()
        counter, histogram = self._counter, self._histogram
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests.")
        self._cached_tokens = counter("prompt_tokens_cached", "Prompt tokens taken from the prefix cache.")
        self._generation_tokens = counter("generation_tokens", "Tokens generated and handed out.")
        self._success = Counter("vllm:request_success", "Sequences ended, by reason.",
                                (*self._labels, "finished_reason"), registry=self.registry)  # fmt: skip
        for reason in FINISHED_REASONS:
            self._success.labels(**self._labels, finished_reason=reason)
        self._rejections = Counter("vllm:admission_rejections", "Refused with 503, 429, 408, or as no HTTP, by reason.",
                                   ("model_name", "reason"), registry=self.registry)  # fmt: skip
        for reason in REFUSED_REASONS:
            self._rejections.labels(model_name=model_name, reason=reason)
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self._itl = self._tally(
            "vllm:inter_token_latency_seconds", "Time between two tokens of a sequence.", ITL_BUCKETS
        )
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean time per token after the first.",
                               ITL_BUCKETS)  # fmt: skip
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCY_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first scheduled.", LATENCY_BUCKETS)
        self._inference = histogram("request_inference_time_seconds", "First scheduled to last token.",
                                    LATENCY_BUCKETS)  # fmt: skip
        self._prefill = histogram("request_prefill_time_seconds", "First scheduled to first token.", LATENCY_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "First token to last token.", LATENCY_BUCKETS)
        self._prompt_len = histogram("request_prompt_tokens", "Prompt tokens of a sequence.", TOKEN_BUCKETS)
        self._output_len = histogram("request_generation_tokens", "Generated tokens of a sequence.", TOKEN_BUCKETS)
        self._max_output_len = histogram("request_max_num_generation_tokens",
                                         "Longest of the sequences of a prompt.", TOKEN_BUCKETS)  # fmt: skip
        self._params_n = histogram("request_params_n", "The parameter n.", COUNT_BUCKETS)
        self._params_max_tokens = histogram("request_params_max_tokens", "Tokens allowed.", TOKEN_BUCKETS)
        self._iteration = self._tally("vllm:iteration_tokens_total", "Tokens run in one engine step.", STEP_BUCKETS)
        self._step_s = self._tally("spq:step_seconds", "Duration of one engine step.", ITL_BUCKETS)
        self._phase_s = self._tally("spq:step_phase_seconds", "Time of one engine step by phase, on the host.",
                                    PHASE_BUCKETS, split="phase", parts=PHASES)  # fmt: skip
        self._http = Counter("http_requests", "Requests by route.", HTTP_LABELS, registry=self.registry)
        self._http_s = Histogram("http_request_duration_seconds", "Time until the last byte.", ("handler", "method"),
                                 registry=self.registry, buckets=LATENCY_BUCKETS)  # fmt: skip
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes and the like, as of any server
        self._live = LiveCollector(self._labels, self._rate)
        self.registry.register(self._live)

    def bind(
        self,
        *,
        stats: Callable[[], EngineStats | None],
        status: Callable[[], Status],
        info: Callable[[], ModelInfo | None],
    ) -> None:
        """Where the live numbers come from; each is called once per scrape and may return None while starting."""
        self._live.stats, self._live.status, self._live.info = stats, status, info

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def step(self, num_tokens: int, seconds: float, times: StepTimes) -> None:
        """One engine step; called on the engine's thread."""
        self._iteration.observe(num_tokens)
        self._step_s.observe(seconds)
        for part, phase in enumerate(PHASES):
            self._phase_s.observe(getattr(times, phase), part=part)

    def prompt(self, num_tokens: int, num_cached: int) -> None:
        """A prompt whose first output was handed out."""
        self._prompt_tokens.inc(num_tokens)
        self._cached_tokens.inc(num_cached)

    def first_token(self, seconds: float) -> None:
        """A sequence's first token, counted from its arrival."""
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """`count` later tokens that came together, `seconds` after the one before them: each took its share."""
        self._itl.observe(seconds / count, count)

    def tokens(self, count: int) -> None:
        """Tokens handed out: exactly those that `usage.completion_tokens` counts."""
        self._generation_tokens.inc(count)
        self._rate.add(count)

    def sequence_ended(self, sequence: Sequence, *, num_tokens: int, reason: str, last_token_s: float | None) -> None:
        """A sequence ended for one of FINISHED_REASONS after `num_tokens`; `last_token_s` is monotonic."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        timings = sequence.timings
        self._prompt_len.observe(sequence.num_prompt_tokens)
        self._output_len.observe(num_tokens)
        ended_s = last_token_s if last_token_s is not None else time.monotonic()
        self._e2e.observe(ended_s - timings.arrived_s)
        if timings.scheduled_s is None:
            return
        self._queue.observe(timings.scheduled_s - timings.arrived_s)
        self._inference.observe(max(0.0, ended_s - timings.scheduled_s))
        if timings.first_token_s is None:
            return
        self._prefill.observe(timings.first_token_s - timings.scheduled_s)
        decode_s = max(0.0, ended_s - timings.first_token_s)
        self._decode.observe(decode_s)
        if num_tokens > 1:
            self._tpot.observe(decode_s / (num_tokens - 1))

    def prompt_ended(self, params: SamplingParams, *, n: int, max_num_tokens: int) -> None:
        """All `n` sequences of a prompt ended; the longest had `max_num_tokens`."""
        self._params_n.observe(n)
        self._params_max_tokens.observe(params.max_tokens)
        self._max_output_len.observe(max_num_tokens)

    @property
    def tokens_per_second(self) -> float:
        """Generated, mean of the last ten seconds."""
        return self._rate.per_second()

    def rejected(self, reason: str) -> None:
        """A request was refused with 503 or 429, or by the connection itself."""
        self._rejections.labels(model_name=self._labels["model_name"], reason=reason).inc()

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """An HTTP request was answered."""
        self._http.labels(handler=handler, method=method, status=str(status)).inc()
        self._http_s.labels(handler=handler, method=method).observe(seconds)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", text, tuple(self._labels), registry=self.registry, buckets=buckets)
        return histogram.labels(**self._labels)

    def _tally(
        self,
        name: str,
        text: str,
        buckets: tuple[float, ...],
        *,
        split: str | None = None,
        parts: tuple[str, ...] = ("",),
    ) -> Tally:
        tally = Tally(name, text, self._labels, buckets, split=split, parts=parts)
        self.registry.register(tally)
        return tally


def sleep_states(phase: Phase) -> dict[str, float]:
    """vLLM's states of sleep. There is one kind here: weights and cache are dropped, which it calls discard_all."""
    return {
        "awake": float(phase in ("ready", "draining")),
        "weights_offloaded": 0.0,
        "discard_all": float(phase in ("sleeping", "drained")),
    }


class LiveCollector(Collector):
    """Reads the engine, the service's status and the model's facts once per scrape."""

    def __init__(self, labels: dict[str, str], rate: TokenRate) -> None:
        self.stats: Callable[[], EngineStats | None] = lambda: None
        self.status: Callable[[], Status | None] = lambda: None
        self.info: Callable[[], ModelInfo | None] = lambda: None
        self._labels = labels
        self._rate = rate

    def collect(self) -> Iterable[Metric]:
        """All live families, with zeros while there is no engine."""
        yield from self._engine(self.stats())
        yield self._gauge("spq:generation_tokens_per_second", "Mean of the last 10 s.", self._rate.per_second())
        status = self.status()
        if status is not None:
            yield self._gauge("spq:ready", "1 while requests are served, or wake the model.", float(status.accepts))
            phases = {phase: float(phase == status.phase) for phase in get_args(Phase)}
            yield self._gauges("spq:phase", "1 for the phase the server is in.", "phase", phases)
            yield self._gauges("vllm:engine_sleep_state", "1 for the state the engine is in.", "sleep_state",
                               sleep_states(status.phase))  # fmt: skip
            yield self._gauge("spq:startup_progress", "Share of the start that is done.", status.progress)
            yield self._gauges("spq:startup_seconds", "Time in each phase.", "phase", status.phase_seconds)
        if (info := self.info()) is not None:
            yield from self._model(info)

    def _engine(self, stats: EngineStats | None) -> Iterable[Metric]:
        def read(name: str) -> float:
            return 0.0 if stats is None else float(getattr(stats, name))

        gauge = self._gauge
        yield gauge("vllm:num_requests_running", "Sequences in the batch.", read("num_running"))
        yield gauge("vllm:num_requests_waiting", "Sequences in the queue.", read("num_waiting"))
        yield gauge("vllm:kv_cache_usage_perc", "KV pages in use, 0..1.", read("kv_usage"))
        yield gauge("vllm:gpu_cache_usage_perc", "Old name of kv_cache_usage_perc.", read("kv_usage"))
        for name, text, field in (
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
            ("vllm:prefix_cache_hits", "Prompt tokens found there.", "prefix_hits"),
            ("vllm:num_preemptions", "Sequences put back for lack of KV pages.", "num_preemptions"),
            ("vllm:spec_decode_num_drafts", "Guesses of next tokens.", "num_drafts"),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed.", "num_draft_tokens"),
            ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right.", "num_accepted_tokens"),
        ):
            family = CounterMetricFamily(name, text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), read(field))
            yield family

    def _model(self, info: ModelInfo) -> Iterable[Metric]:
        config: dict[str, float | int | str] = {
            "block_size": info.block_size, "num_gpu_blocks": info.num_blocks, "cache_dtype": info.kv_dtype,
            "kv_cache_size_tokens": info.kv_tokens, "kv_cache_max_concurrency": info.kv_tokens / info.max_model_len,
        }  # fmt: skip
        yield self._facts("vllm:cache_config_info", "Layout of the KV cache.", config)
        yield self._gauges(
            "spq:memory_bytes", "Bytes on the device by kind; host_ kinds are on the host.", "kind", info.ledger
        )
        if info.compression:
            yield self._facts("spq:compression_info", "What compression did.", info.compression)
        for fact, name in (("ratio_to_fp16", "spq:compression_ratio"), ("mean_rank_kept", "spq:ranks_kept")):
            if fact in info.compression:
                yield self._gauge(name, "From the packed model's manifest.", float(info.compression[fact]))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _gauges(self, name: str, text: str, label: str, values: dict[str, int] | dict[str, float]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], float(value))
        return family

    def _facts(self, name: str, text: str, facts: dict[str, float | int | str]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=[*self._labels, *facts])
        family.add_metric([*self._labels.values(), *map(str, facts.values())], 1.0)
        return family
