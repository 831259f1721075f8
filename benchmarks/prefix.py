"""`python -m benchmarks.prefix`: time to first token of a prompt whose beginning was seen before, against a cold one.

The real server over HTTP. In turn: a prompt of tokens never seen, then one that shares its first `--shared` tokens with
it and has a tail of its own. Single requests, so that nothing waits for anything else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

import httpx
from transformers import AutoConfig

from server.bench import start_server
from server.bench_model import random_model

TOKENIZER = Path("demo/storyteller")


def first_token(client: httpx.Client, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first text of a stream, and how many of the prompt's tokens were cached."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    started = time.perf_counter()
    seconds, cached = None, 0
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            seconds = seconds or time.perf_counter() - started
            usage = json.loads(line[6:]).get("usage")
            cached = usage["prompt_tokens_details"]["cached_tokens"] if usage else cached
    assert seconds is not None
    return seconds, cached


def main() -> None:
    """Measure and print a table, then JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix", description=__doc__.split("\n")[0])
    parser.add_argument("--random", default="768x12", metavar="WIDTHxLAYERS", help="shape of the random model")
    parser.add_argument("--preset", default="int8", choices=("default", "paper", "int8", "none"))
    parser.add_argument("--shared", type=int, default=512, help="tokens that prompts share (default: 512)")
    parser.add_argument("--tail", type=int, default=16, help="tokens of a prompt's own (default: 16)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/spq-serve").expanduser())
    arguments = parser.parse_args()
    arguments.cache_dir.mkdir(parents=True, exist_ok=True)
    model = random_model(arguments.random, TOKENIZER, arguments.cache_dir)
    vocab = AutoConfig.from_pretrained(model).vocab_size
    rng = random.Random(0)
    cold: list[float] = []
    warm: list[float] = []

    def draw(count: int) -> list[int]:
        return [rng.randrange(8, vocab) for _ in range(count)]

    log = arguments.cache_dir / "prefix.log"
    process, url = start_server(str(model), arguments.preset, arguments.threads, arguments.cache_dir, log)
    try:
        with httpx.Client(base_url=url, timeout=None) as client:
            for _ in range(arguments.rounds + 1):
                shared = draw(arguments.shared)
                for times, expected in ((cold, 0), (warm, arguments.shared // 16 * 16)):
                    seconds, cached = first_token(client, shared + draw(arguments.tail))
                    if cached != expected:
                        raise RuntimeError(f"{cached} tokens came from the cache instead of {expected}")
                    times.append(seconds)
    finally:
        process.terminate()
        process.wait()
    ratios = [a / b for a, b in zip(cold[1:], warm[1:], strict=True)]
    figures = {
        "cold_ms": 1e3 * statistics.median(cold[1:]),
        "shared_ms": 1e3 * statistics.median(warm[1:]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    for name, value in figures.items():
        print(f"{name:10} {value:8.2f}")
    print(json.dumps({"options": {k: str(v) for k, v in vars(arguments).items()}, **figures}))


if __name__ == "__main__":
    main()
