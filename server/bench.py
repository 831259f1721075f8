"""`python -m server.bench`: tokens/s, time to first token and inter-token latency, against transformers.

A benchmark, not a test: it starts the real server in a process of its own, loads it over HTTP in a closed loop, and
runs transformers' `generate` on the same model in this process, in turn (server, transformers, server, ...). The
rival is at its best: float32 weights, all prompts of equal length in one static batch, no HTTP. Prompts are random
token ids, so no prefix is shared; every answer has the same length. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from server.bench_model import random_model

START_LIMIT_S = 600


@dataclass(slots=True)
class Sample:
    """One run at one concurrency. Times in seconds."""

    tokens_per_s: float
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)


class Clock(StoppingCriteria):
    """Notes when each token of a static batch is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Never stops."""
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Random token ids; the lowest 8 are left out, special tokens live there."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, vocab, (count, length), generator=generator).tolist()


def run_transformers(model: Any, batch: list[list[int]], new_tokens: int) -> Sample:
    """One static batch, greedy, to the end."""
    clock = Clock()
    ids = torch.tensor(batch, device=model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    gaps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    spent = clock.times[-1] - started
    return Sample(len(batch) * new_tokens / spent, [clock.times[0] - started] * len(batch), gaps * len(batch))


async def run_server(url: str, batch: list[list[int]], new_tokens: int) -> Sample:
    """All prompts at once, each a streamed completion."""
    sample = Sample(0.0)

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> int:
        body = {"model": "bench", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        last, count = time.perf_counter(), 0
        first = True
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    count = chunk["usage"]["completion_tokens"]
                elif chunk["choices"] and chunk["choices"][0]["text"]:
                    now = time.perf_counter()
                    (sample.ttft_s if first else sample.itl_s).append(now - last)
                    last, first = now, False
        return count

    limits = httpx.Limits(max_connections=len(batch))
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        started = time.perf_counter()
        counts = await asyncio.gather(*(one(client, prompt) for prompt in batch))
        spent = time.perf_counter() - started
    if set(counts) != {new_tokens}:
        raise RuntimeError(f"answers of {sorted(set(counts))} tokens instead of {new_tokens}: not the same work")
    sample.tokens_per_s = sum(counts) / spent
    return sample


def start_server(model: str, preset: str, threads: int, cache: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Our server in its own process; returns it and its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "--model", model, "--served-model-name", "bench", "--port", str(port)]
    command += ["--preset", preset, "--threads", str(threads), "--cache-dir", str(cache)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPQ_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_LIMIT_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return process, url
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()[-2000:]}")


def resident_bytes(pid: int) -> int:
    """Peak resident set of a process, from the kernel."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def summarize(samples: list[Sample]) -> dict[str, float]:
    """Medians over rounds; the spread is of tokens/s."""
    ttft = sorted(t for s in samples for t in s.ttft_s)
    itl = sorted(t for s in samples for t in s.itl_s)
    speeds = [s.tokens_per_s for s in samples]
    return {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "ttft_p50_ms": 1e3 * statistics.median(ttft),
        "itl_p50_ms": 1e3 * statistics.median(itl),
        "itl_p95_ms": 1e3 * itl[int(0.95 * (len(itl) - 1))],
    }


def main() -> None:
    """Run everything and print a table, then JSON."""
    arguments = _parser().parse_args()
    if arguments.random is not None:
        arguments.model = str(random_model(arguments.random, Path(arguments.model), arguments.cache_dir))
    torch.set_num_threads(arguments.threads)
    config = transformers.AutoConfig.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    arguments.cache_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for preset in arguments.presets.split(","):
        process, url = start_server(
            arguments.model, preset, arguments.threads, arguments.cache_dir, arguments.cache_dir / f"{preset}.log"
        )
        try:
            for concurrency in map(int, arguments.concurrency.split(",")):
                ours, theirs = [], []
                for turn in range(arguments.rounds + 1):  # the first turn warms both and is dropped
                    batch = prompts(concurrency, arguments.prompt_tokens, config.vocab_size, 100 * concurrency + turn)
                    ours.append(asyncio.run(run_server(url, batch, arguments.new_tokens)))
                    theirs.append(run_transformers(model, batch, arguments.new_tokens))
                pair = {f"spq-serve {preset}": summarize(ours[1:]), "transformers float32": summarize(theirs[1:])}
                ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(ours[1:], theirs[1:], strict=True)]
                for name, figures in pair.items():
                    rows.append({"system": name, "against": preset, "concurrency": concurrency, **figures})
                    print(_line(name, concurrency, figures), flush=True)
                print(f"  ratio of tokens/s: {statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]")
                rows[-2]["ratio"] = statistics.median(ratios)
            rows[-2]["server_peak_rss_bytes"] = resident_bytes(process.pid)
            print(f"  server's peak resident set: {resident_bytes(process.pid) / 2**20:.0f} MiB", flush=True)
        finally:
            process.terminate()
            process.wait()
    print(json.dumps({**_facts(arguments), "rows": rows}))


def _line(name: str, concurrency: int, figures: dict[str, float]) -> str:
    return (
        f"{name:24} x{concurrency:<3} {figures['tokens_per_s']:8.1f} tok/s "
        f"[{figures['tokens_per_s_min']:.1f}..{figures['tokens_per_s_max']:.1f}]  TTFT {figures['ttft_p50_ms']:7.1f} ms"
        f"  ITL {figures['itl_p50_ms']:6.2f} ms p50, {figures['itl_p95_ms']:6.2f} ms p95"
    )


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() or None,
        "options": {k: str(v) for k, v in vars(arguments).items() if k != "cache_dir"},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="demo/storyteller", help="plain Hugging Face folder (default: demo/storyteller)"
    )
    parser.add_argument(
        "--random", metavar="WIDTHxLAYERS", help="random weights of that shape, e.g. 768x12, with the model's tokenizer"
    )
    parser.add_argument("--presets", default="none,int8,default", help="compressions of our server to measure")
    parser.add_argument("--concurrency", default="1,8,16", help="streams at once (default: 1,8,16)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens per prompt (default: 128)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens per answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="turns per concurrency after a warm-up (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of each (default: cores)")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/spq-serve").expanduser())
    return parser


if __name__ == "__main__":
    main()
