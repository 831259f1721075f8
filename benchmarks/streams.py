"""`python -m benchmarks.streams`: how many streamed tokens a second one server process carries, without a model.

The real server (HTTP, detokenizing, engine loop, scheduler) with a runner that draws a known token for every sequence,
at once or after `--step-ms`; a client in another process over raw sockets. Every token must arrive as an event of its
own, and the usage must count it. Given are tokens/s by the wall clock, and CPU time per token of either process: where
the client's is far below the server's, the client does not bound the figure. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.config import ServerConfig
from server.core import SampledToken, ScheduledBatch, StepTimes
from server.engine.engine import Engine, ModelInfo
from server.engine.loop import EngineLoop
from server.listener import make_server
from server.scheduler.blocks import BlockManager
from server.scheduler.scheduler import Scheduler
from server.service import Service
from server.tokenizer import Tokenizer

MODEL = "demo/storyteller"
BLOCK_SIZE = 16
PROMPT_TOKENS = 8
MAX_LEN = 4096
WORDS = 200  # different tokens that the runner draws, each of them visible text


class ScriptedRunner:
    """Draws the words in turn, each sequence from its own length on; takes `step_s` a step, as a device would."""

    runs_ahead = False

    def __init__(self, words: list[int], step_s: float) -> None:
        self._tokens = [SampledToken(word) for word in words]
        self._step_s = step_s
        self._due_s = 0.0

    def launch(self, batch: ScheduledBatch, times: StepTimes) -> ScriptedRunner:
        """Keep the batch."""
        self._batch = batch
        return self

    def result(self) -> list[SampledToken]:
        """One token per sampling work."""
        if self._step_s:
            self._due_s = max(self._due_s + self._step_s, time.perf_counter())
            time.sleep(max(0.0, self._due_s - time.perf_counter()))
        tokens = self._tokens
        return [tokens[len(work.sequence.token_ids) % len(tokens)] for work in self._batch.work if work.samples]


class ScriptedService(Service):
    """The real service, ready at once with an engine that needs no model."""

    def __init__(self, config: ServerConfig, step_s: float) -> None:
        super().__init__(config)
        self._step_s = step_s

    def start(self) -> None:
        """Build the engine here and now."""
        config = self.config
        tokenizer = Tokenizer(Path(config.model))
        blocks = BlockManager(config.max_num_seqs * (MAX_LEN // BLOCK_SIZE), BLOCK_SIZE)
        scheduler = Scheduler(
            blocks,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=MAX_LEN,
            admission_reserve=config.admission_reserve,
        )
        visible = (i for i in range(len(tokenizer)) if tokenizer.token_bytes(i).decode("ascii", "ignore").strip())
        words = [i for i, _ in zip((i for i in visible if not tokenizer.is_special(i)), range(WORDS), strict=False)]
        info = ModelInfo(
            max_model_len=MAX_LEN, vocab_size=len(tokenizer), hidden_size=1, eos_token_ids=(), block_size=BLOCK_SIZE,
            num_blocks=blocks.num_blocks, kv_tokens=blocks.num_blocks * BLOCK_SIZE, max_num_seqs=config.max_num_seqs,
            dtype="none", kv_dtype="none", device="none", backend="scripted", ledger={},
        )  # fmt: skip
        loop = EngineLoop(scheduler, ScriptedRunner(words, self._step_s), on_step=self.metrics.step)
        engine = Engine(loop, info, max_queue=config.max_queue)
        self.life.install(engine, tokenizer)


@dataclass(slots=True)
class Round:
    """One burst of streams. Seconds; CPU seconds of each process."""

    wall_s: float
    server_cpu_s: float
    client_cpu_s: float
    tokens: int
    gaps_s: list[float] = field(default_factory=list)  # between the reads of a stream


class StreamClient(asyncio.Protocol):
    """One connection: sends a request, keeps what comes and when; parses nothing while the clock runs."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.pieces: list[bytes] = []
        self.times: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self.transport = transport

    def send(self) -> None:
        """Send the request."""
        assert isinstance(self.transport, asyncio.Transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Keep a piece; the last chunk of the body ends with an empty chunk."""
        self.pieces.append(data)
        self.times.append(time.perf_counter())
        if data.endswith(b"0\r\n\r\n") and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """A stream that ends early is a failure."""
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server closed a stream"))


def request_bytes(host: str, path: str, max_tokens: int, stream: int) -> bytes:
    """A streaming request with a prompt of its own."""
    body = {"model": "bench", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": max_tokens,
            "temperature": 0}  # fmt: skip
    if path == "/v1/completions":
        body["prompt"] = [10 + stream, *range(20, 20 + PROMPT_TOKENS - 1)]
    else:
        body["messages"] = [{"role": "user", "content": f"stream {stream}"}]
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


async def run_round(port: int, pid: int, path: str, streams: int, max_tokens: int) -> Round:
    """All streams at once; checks that every token came as its own event."""
    loop = asyncio.get_running_loop()
    clients: list[StreamClient] = []
    for i in range(streams):
        request = request_bytes(f"127.0.0.1:{port}", path, max_tokens, i)
        _, client = await loop.create_connection(lambda r=request: StreamClient(r), "127.0.0.1", port)  # type: ignore[misc]
        clients.append(client)
    cpu, own, started = process_cpu_s(pid), time.process_time(), time.perf_counter()
    for client in clients:
        client.send()
    await asyncio.gather(*(client.done for client in clients))
    wall = time.perf_counter() - started
    spent = Round(wall, process_cpu_s(pid) - cpu, time.process_time() - own, streams * max_tokens)
    for client in clients:
        client.transport.close()
        check(b"".join(client.pieces), max_tokens, path)
        spent.gaps_s += [b - a for a, b in zip(client.times, client.times[1:], strict=False)]
    return spent


def check(answer: bytes, max_tokens: int, path: str) -> None:
    """Raise unless the stream has `max_tokens` text events and its usage says so."""
    assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
    events = [line for line in answer.split(b"\n") if line.startswith(b"data: {")]
    chunks = [json.loads(event[6:]) for event in events]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    texts = [c["text"] if path == "/v1/completions" else c["delta"].get("content") for c in choices]
    if sum(map(bool, texts)) != max_tokens or chunks[-1]["usage"]["completion_tokens"] != max_tokens:
        raise RuntimeError(f"{sum(map(bool, texts))} events and usage {chunks[-1]['usage']} for {max_tokens} tokens")


def process_cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return once the port answers."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("the server did not start")


def main() -> None:
    """Be the server (--serve) or start one, load it, and print the figures."""
    arguments = _parser().parse_args()
    if arguments.serve is not None:
        options: dict[str, Any] = {
            "model": MODEL, "served_model_names": ("bench",), "port": arguments.serve,
            "max_num_seqs": arguments.streams, "max_batch_tokens": max(512, 2 * arguments.streams),
            "max_queue": arguments.streams,
        }  # fmt: skip
        make_server(ScriptedService(ServerConfig(**options), arguments.step_ms / 1e3)).run()
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.streams", "--serve", str(port), "--streams", str(arguments.streams)]
    process = subprocess.Popen([*command, "--step-ms", str(arguments.step_ms)])
    try:
        wait_ready(port, process)
        rounds = [
            asyncio.run(run_round(port, process.pid, arguments.path, arguments.streams, arguments.tokens))
            for _ in range(arguments.rounds + 1)
        ][1:]  # the first one warms
    finally:
        process.terminate()
        process.wait()
    speeds = [r.tokens / r.wall_s for r in rounds]
    gaps = sorted(gap for r in rounds for gap in r.gaps_s)
    figures = {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "server_cpu_us_per_token": 1e6 * statistics.median(r.server_cpu_s / r.tokens for r in rounds),
        "client_cpu_us_per_token": 1e6 * statistics.median(r.client_cpu_s / r.tokens for r in rounds),
        "gap_p50_ms": 1e3 * statistics.median(gaps),
        "gap_p95_ms": 1e3 * gaps[int(0.95 * (len(gaps) - 1))],
        "reads_per_token": len(gaps) / sum(r.tokens for r in rounds),
    }
    for name, value in figures.items():
        print(f"{name:26} {value:10.2f}")
    print(json.dumps({"options": vars(arguments), **figures}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=256, help="streams at once (default: 256)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per stream (default: 200)")
    parser.add_argument("--step-ms", type=float, default=0.0, help="time of a step of the runner (default: 0)")
    parser.add_argument("--path", default="/v1/completions", choices=("/v1/completions", "/v1/chat/completions"))
    parser.add_argument("--rounds", type=int, default=5, help="rounds after a warm-up (default: 5)")
    parser.add_argument("--serve", type=int, metavar="PORT", help="be the server on this port (used by the program)")
    return parser


if __name__ == "__main__":
    main()
