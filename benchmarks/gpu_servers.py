"""The server on one model, loaded with bursts of streams: tokens/s, time per token, and what the device holds.

One server in a process of its own, over HTTP. Time per token never has prefill in it: it is counted from the gaps
between the tokens that a client saw, and the rate of a batch over the time in which all of its streams were decoding.
The rate with prefill in it stands beside that.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.gpu_memory import device_bytes
from loadtest.client import Wave, make_prompts, run_wave
from loadtest.process import Running
from loadtest.stream import Answer
from loadtest.turns import percentile

Row = dict[str, Any]
STOP_S = 10.0  # to end politely; accepted requests are not waited for


@dataclass(frozen=True, slots=True)
class Load:
    """The work, equal for all: bursts of each number of streams, after one that warms up."""

    levels: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Served:
    """A model folder as a server of ours, by the name it has in tables."""

    system: str
    folder: Path
    flags: tuple[str, ...]

    def command(self, port: int, load: Load) -> list[str]:
        """With room for the largest burst and no more, and no prompt reused."""
        flags = ("--preset", "none", "--prefix-caching", "off", "--max-num-seqs", str(max(load.levels)),
                 "--max-model-len", str(load.prompt_tokens + load.new_tokens), "--drain-timeout", "0")  # fmt: skip
        model = ("--model", str(self.folder), "--served-model-name", "bench", "--port", str(port))
        return [sys.executable, "-m", "server", *model, *flags, *self.flags]


def measure_server(
    served: Served, load: Load, environment: Mapping[str, str], log: Path, deadline: float
) -> Iterator[Row]:
    """A row per level, then one of memory. `deadline` is of time.monotonic(); SPQ_ variables are left out.

    Raises NotReady, and RuntimeError with the end of the server's log where it ends or answers wrongly.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clean = {k: v for k, v in environment.items() if not k.startswith("SPQ_")} | {"HF_HUB_OFFLINE": "1"}
    idle = device_bytes(None)
    running = Running(served.command(port, load), clean, log)
    try:
        ready_s = running.wait_ready(f"http://127.0.0.1:{port}/ready", max(0.0, deadline - time.monotonic()))
        ready = device_bytes(running.session)
        _burst(served.folder, port, load, min(8, max(load.levels)), -1, deadline)  # warms up: the client too
        for streams in load.levels:
            waves = [_burst(served.folder, port, load, streams, round_, deadline) for round_ in range(load.rounds)]
            yield {"kind": "speed", "system": served.system, "batch": streams, **summarize(waves)}
        full = device_bytes(running.session)
        yield {
            "kind": "memory", "system": served.system, "bytes_idle": idle, "bytes_ready": ready,
            "bytes_full_kv": full, "ready_s": ready_s,
        }  # fmt: skip
    except (OSError, EOFError, ValueError) as error:  # a connection that broke, an answer cut short
        tail = log.read_text("utf-8", errors="replace")[-1500:]
        raise RuntimeError(f"{error!r}; the end of the server's log:\n{tail}") from error
    finally:
        running.stop(STOP_S)


def _burst(folder: Path, port: int, load: Load, streams: int, round_: int, deadline: float) -> Wave:
    """One wave of the right sizes; another seed each time, so that no prompt comes twice."""
    prompts = make_prompts(folder, streams, load.prompt_tokens, seed=1000 * streams + round_)

    async def run() -> Wave:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await run_wave(port, prompts, load.new_tokens, {"ignore_eos": True})

    wave = asyncio.run(run())
    wave.check_sizes(load.prompt_tokens)
    return wave


def summarize(waves: Sequence[Wave]) -> Row:
    """Medians over waves; the spread is of the time per token. Times in ms."""
    answers = [answer for wave in waves for answer in wave.answers]
    each = [ms for answer in answers if (ms := _ms_per_token(answer)) is not None]
    by_wave = [
        statistics.median(values)
        for wave in waves
        if (values := [ms for answer in wave.answers if (ms := _ms_per_token(answer)) is not None])
    ]
    rates = [rate for wave in waves if (rate := decoding_rate(wave)) is not None]
    ttft = [1e3 * answer.ttft_s for answer in answers]
    gaps = [1e3 * gap for answer in answers for gap in answer.gaps_s]
    asked = sum(len(wave.answers) * wave.new_tokens for wave in waves)
    return {
        "ms_per_token": statistics.median(each) if each else None,
        "ms_per_token_min": min(by_wave, default=None),
        "ms_per_token_max": max(by_wave, default=None),
        "decode_tokens_per_s": statistics.median(rates) if rates else None,
        "tokens_per_s": statistics.median(wave.tokens_per_s for wave in waves),
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_max_ms": max(ttft),
        "itl_p50_ms": percentile(gaps, 0.5) if gaps else None,
        "itl_p95_ms": percentile(gaps, 0.95) if gaps else None,
        "chunks_per_token": sum(answer.chunks for answer in answers) / asked,
        "rounds": len(waves),
    }


def _ms_per_token(answer: Answer) -> float | None:
    """From the first token to the last, by the server's count of tokens: right for chunks of several tokens too."""
    if not answer.gaps_s or answer.completion_tokens is None or answer.completion_tokens < 2:
        return None
    return 1e3 * sum(answer.gaps_s) / (answer.completion_tokens - 1)


def decoding_rate(wave: Wave) -> float | None:
    """Tokens/s of all streams together between the last first token and the first last token: all are decoding then.

    None where there is no such time: the first answer had ended before the last began.
    """
    times = [list(accumulate((answer.ttft_s, *answer.gaps_s))) for answer in wave.answers]
    begin, end = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    if end <= begin:
        return None
    per_chunk = [wave.new_tokens / len(stream) for stream in times]
    counts = [sum(begin < t <= end for t in stream) for stream in times]
    return sum(n * each for n, each in zip(counts, per_chunk, strict=True)) / (end - begin)
