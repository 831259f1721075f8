"""What of the benchmark could be wrong without anyone seeing it: reading streams, memory, equal work, verdicts.

The servers here are a small HTTP server that sends canned bytes, and `sleep`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.client import Answer, Prompt, UnequalWork, Wave, make_prompts, read_event, run_wave
from benchmarks.process import Cpu, NotReady, Running, members, peak_rss_bytes, pss_bytes, read_cpu
from benchmarks.report import Memory, Turn, judge, percentile, summarize
from benchmarks.servers import catalogue, with_flags

# One chunk with text and one with the usage, in the words of each server.
TEXT = {
    "ours": '{"id":"c","choices":[{"index":0,"text":" a","finish_reason":null}],"usage":null}',
    "llama.cpp": '{"choices":[{"text":" a","index":0,"logprobs":null,"finish_reason":null}],"created":1,"model":"m"}',
    "transformers": '{"id":"r","choices":[{"index":0,"text":" a"}],"created":1,"model":"m","object":"text_completion"}',
    "vllm": '{"id":"c","choices":[{"index":0,"text":" a","logprobs":null,"stop_reason":null}],"usage":null}',
}
USAGE = '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}'
LAST = {
    "ours": '{"id":"c","object":"text_completion","choices":[],' + USAGE + "}",
    "llama.cpp": '{"choices":[{"text":"","index":0,"finish_reason":"length"}],' + USAGE + ',"timings":{"prompt_n":3}}',
    "transformers": '{"id":"r","choices":[{"finish_reason":"length","index":0,"text":""}],' + USAGE + "}",
    "vllm": '{"id":"c","choices":[],' + USAGE + "}",
}


class CannedServer(socketserver.ThreadingTCPServer):
    """Answers every POST with the same bytes, cut into pieces at odd places, and keeps the bodies it got."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, status: str, payload: bytes, chunked: bool) -> None:
        self.status, self.payload, self.chunked = status, payload, chunked
        self.bodies: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), CannedHandler)


class CannedHandler(socketserver.StreamRequestHandler):
    server: CannedServer

    def handle(self) -> None:
        length = 0
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        encoding = "Transfer-Encoding: chunked\r\n" if self.server.chunked else ""
        self.wfile.write(f"HTTP/1.1 {self.server.status}\r\n{encoding}\r\n".encode())
        for start in range(0, len(self.server.payload), 50):
            piece = self.server.payload[start : start + 50]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if self.server.chunked else piece)
        if self.server.chunked:
            self.wfile.write(b"0\r\n\r\n")


@contextlib.contextmanager
def canned(
    events: list[str], *, status: str = "200 OK", chunked: bool = True, end: str = "\n"
) -> Iterator[CannedServer]:
    payload = "".join(f"data: {event}{end}{end}" for event in [*events, "[DONE]"]).encode()
    with CannedServer(status, payload, chunked) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def wave_of(server: CannedServer, count: int = 1, **options: Any) -> Wave:
    prompts = [Prompt(" x y z", [5, 6, 7])] * count
    return asyncio.run(run_wave(server.server_address[1], prompts, 2, {"ignore_eos": True}, **options))


@pytest.mark.parametrize("name", sorted(TEXT))
def test_an_event_of_each_server_is_read(name: str) -> None:
    answer = Answer()
    assert read_event(TEXT[name].encode(), answer)
    assert not read_event(LAST[name].encode(), answer), "the closing event carries no text"
    assert (answer.chunks, answer.prompt_tokens, answer.completion_tokens) == (1, 3, 2)


def test_an_error_event_is_no_token() -> None:
    with pytest.raises(RuntimeError, match="out of pages"):
        read_event(b'{"error": {"message": "out of pages"}}', Answer())


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "plain"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("name", sorted(TEXT))
def test_a_whole_stream_is_read_however_it_is_cut(name: str, chunked: bool, end: str) -> None:
    with canned([TEXT[name], TEXT[name], LAST[name]], chunked=chunked, end=end) as server:
        wave = wave_of(server, count=3)
    wave.check(prompt_tokens=3)
    assert [len(answer.gaps_s) for answer in wave.answers] == [1, 1, 1]
    assert all(0 < answer.ttft_s < wave.spent_s for answer in wave.answers)
    assert wave.tokens_per_s == pytest.approx(6 / wave.spent_s)


def test_prompts_go_as_ids_or_as_text() -> None:
    with canned([TEXT["ours"], TEXT["ours"], LAST["ours"]]) as server:
        wave_of(server)
        wave_of(server, as_ids=False)
    assert [body["prompt"] for body in server.bodies] == [[5, 6, 7], " x y z"]
    assert all(body["ignore_eos"] and body["stream"] and body["temperature"] == 0 for body in server.bodies)


def test_a_refused_request_is_an_error_with_its_reason() -> None:
    with canned(["no such field"], status="400 Bad Request") as server, pytest.raises(RuntimeError, match="400"):
        wave_of(server)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (Answer(chunks=2, prompt_tokens=3, completion_tokens=1), "answer of 1"),
        (Answer(chunks=2, prompt_tokens=3, completion_tokens=None), "answer of None"),
        (Answer(chunks=2, prompt_tokens=4, completion_tokens=2), "prompt of 4"),
        (Answer(chunks=1, prompt_tokens=3, completion_tokens=2), "1 chunks"),
    ],
)
def test_unequal_work_is_refused(answer: Answer, complaint: str) -> None:
    good = Answer(chunks=2, prompt_tokens=3, completion_tokens=2)
    Wave([good], 1.0, 2).check(prompt_tokens=3)
    with pytest.raises(UnequalWork, match=complaint):
        Wave([good, answer], 1.0, 2).check(prompt_tokens=3)


def test_prompts_are_whole_words_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    vocab = {"<|eos|>": 0, "Ġone": 1, "two": 2, "Ġthree": 3, "Ġ+=": 4, "Ã": 5}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}), "utf-8")
    first, second = make_prompts(tmp_path, 2, 40, seed=1)
    assert set(first.ids) == {1, 3}
    assert first.text == "".join({1: " one", 3: " three"}[i] for i in first.ids)
    assert first != second
    assert make_prompts(tmp_path, 2, 40, seed=1) == [first, second]


HOLD = "import time; held = bytearray(b'x') * (64 << 20); print('up', flush=True); time.sleep(60)"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {HOLD!r}]); {HOLD}"


def test_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    running = Running([sys.executable, "-c", PARENT], os.environ, tmp_path / "log")
    try:
        with running.sampling():
            deadline = time.monotonic() + 20
            while running.log.read_text().count("up") < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
        pids = members(running.session)
        assert len(pids) == 2
        assert pss_bytes(pids) > 128 << 20 > pss_bytes(pids[:1])
        assert peak_rss_bytes(pids) >= pss_bytes(pids)
        assert running.peak_bytes()[0] > 128 << 20
    finally:
        running.stop()
    assert members(running.session) == []


def test_a_sleeping_tree_takes_no_cpu(tmp_path: Path) -> None:
    running = Running([sys.executable, "-c", "while True: pass"], os.environ, tmp_path / "log")
    try:
        while read_cpu(running.session).tree_s < 0.1:
            time.sleep(0.02)
        running.sleep()
        time.sleep(0.05)
        asleep = read_cpu(running.session).tree_s
        time.sleep(0.2)
        assert read_cpu(running.session).tree_s == asleep
        running.wake()
        deadline = time.monotonic() + 20
        while read_cpu(running.session).tree_s < asleep + 0.05 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read_cpu(running.session).tree_s >= asleep + 0.05
    finally:
        running.stop()


def test_the_share_of_others_is_what_server_and_client_did_not_take() -> None:
    before, after = Cpu(100.0, 10.0, 0.0), Cpu(118.0, 24.0, 10.0)
    assert before.cores_of_others(after, own_s=1.0) == pytest.approx((18 - 14 - 1) / 10)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no AVX512')"]
    running = Running(command, os.environ, tmp_path / "log")
    with pytest.raises(NotReady, match="no AVX512"):
        running.wait_ready("http://127.0.0.1:9/health", limit_s=20)
    running.stop()


def turn(server: str, streams: int, round_: int, speed: float, *, noisy: bool = False, **more: Any) -> Turn:
    values = {"ttft_s": [0.1], "itl_s": [0.01, 0.02], "cpu_s_per_token": 0.01} | more
    return Turn(server, streams, round_, speed, others_cores=0.9 if noisy else 0.0, noisy=noisy, **values)


def test_percentiles_are_by_nearest_rank() -> None:
    assert [percentile(range(100), share) for share in (0.0, 0.5, 0.95, 1.0)] == [0, 50, 95, 99]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_noisy_turns_count_only_where_there_is_no_other() -> None:
    mixed = [turn("a", 1, 1, 10.0), turn("a", 1, 2, 2.0, noisy=True), turn("a", 1, 3, 12.0)]
    (cell,) = summarize(mixed)
    assert (cell.tokens_per_s, cell.turns, cell.noisy) == (11.0, 2, False)
    (cell,) = summarize(mixed[1:2])
    assert (cell.tokens_per_s, cell.turns, cell.noisy) == (2.0, 1, True)


BITS = {"ours": 8, "ours-none": 32, "llama.cpp-q8_0": 8, "llama.cpp-q4_0": 4, "vllm-bfloat16": 16}
MEMORY = {
    "ours": Memory(200, 290, 1, 1.0),
    "llama.cpp-q8_0": Memory(290, 300, 1, 1.0),
    "vllm-bfloat16": Memory(900, 990, 4, 1.0),
}


def test_bars_are_judged_against_the_best_rival_that_counts() -> None:
    speeds = {
        "ours": 150.0,
        "ours-none": 400.0,
        "llama.cpp-q8_0": 90.0,
        "llama.cpp-q4_0": 300.0,
        "vllm-bfloat16": 100.0,
    }
    turns = [turn(name, 8, r, speed * (1 + r / 100)) for name, speed in speeds.items() for r in (1, 2)]
    verdict = next(v for v in judge("ours", BITS, turns, MEMORY) if v.bar.startswith("8 streams: tokens/s"))
    assert verdict.rival == "vllm-bfloat16", "4-bit weights and our own variants are not the rivals of this bar"
    assert verdict.ratio == pytest.approx(1.5)
    assert verdict.spread == pytest.approx((1.5, 1.5))
    assert verdict.verdict == "met"
    slower = [turn(t.server, 8, t.round, t.tokens_per_s * (0.99 if t.server == "ours" else 1)) for t in turns]
    verdict = next(v for v in judge("ours", BITS, slower, MEMORY) if v.bar.startswith("8 streams: tokens/s"))
    assert verdict.verdict == "missed"


@pytest.mark.parametrize(("ours_ms", "word"), [(69.0, "met"), (71.0, "missed")])
def test_where_lower_is_better_the_lowest_rival_counts(ours_ms: float, word: str) -> None:
    times = {"ours": ours_ms, "llama.cpp-q8_0": 200.0, "vllm-bfloat16": 100.0, "llama.cpp-q4_0": 20.0}
    turns = [turn(name, 8, 1, 1.0, ttft_s=[ms / 1e3]) for name, ms in times.items()]
    verdict = next(v for v in judge("ours", BITS, turns, MEMORY) if "TTFT" in v.bar)
    assert (verdict.rival, verdict.verdict) == ("vllm-bfloat16", word)


def test_memory_is_judged_without_a_level() -> None:
    verdict = next(v for v in judge("ours", BITS, [], MEMORY) if "memory" in v.bar)
    assert (verdict.rival, verdict.verdict, verdict.spread) == ("llama.cpp-q8_0", "met", None)
    assert (verdict.ours, verdict.theirs) == (290, 300), "of one process the kernel's peak counts"
    assert MEMORY["vllm-bfloat16"].peak_bytes == 900, "of several it would count shared pages twice"


def test_what_was_not_measured_is_not_called_met() -> None:
    turns = [turn("ours", 1, 1, 10.0), turn("llama.cpp-q4_0", 1, 1, 1.0)]
    verdict = next(v for v in judge("ours", BITS, turns, MEMORY) if v.bar.startswith("1 stream"))
    assert (verdict.rival, verdict.ratio, verdict.verdict) == (None, None, "not measured")


def test_a_noisy_side_is_said_in_the_verdict() -> None:
    turns = [turn("ours", 1, 1, 10.0, noisy=True), turn("llama.cpp-q8_0", 1, 1, 1.0)]
    verdict = next(v for v in judge("ours", BITS, turns, MEMORY) if v.bar.startswith("1 stream"))
    assert verdict.verdict == "met (noisy)"


def test_the_table_names_every_server_and_bar() -> None:
    turns = [turn(name, level, 1, 10.0) for name in ("ours", "llama.cpp-q8_0") for level in (1, 8, 16)]
    verdicts = judge("ours", BITS, turns, MEMORY)
    text = report.markdown(summarize(turns), MEMORY, verdicts, "ours")
    assert all(verdict.bar in text for verdict in verdicts)
    assert text.count("| llama.cpp-q8_0 | 8 |") == 1


def test_a_variant_is_its_base_with_flags_appended() -> None:
    servers = catalogue()
    variant = with_flags(servers, "llama.cpp-q8_0-b256=llama.cpp-q8_0 --batch-size 256")
    assert variant.command == (*servers["llama.cpp-q8_0"].command, "--batch-size", "256")
    assert variant.name == "llama.cpp-q8_0-b256"
    with pytest.raises(ValueError, match="BASE"):
        with_flags(servers, "x=unknown --flag")


def test_every_command_is_filled_from_the_options() -> None:
    options = subprocess.run(
        [sys.executable, "-m", "benchmarks.rivals", "--help"], capture_output=True, text=True, check=True
    ).stdout
    values = dict.fromkeys(
        ("model", "llama_server", "gguf", "transformers_python", "vllm_python", "cache", "threads"), "X"
    )
    assert all(f"--{name.replace('_', '-')}" in options for name in values)
    for server in catalogue().values():
        filled = server.filled(values | {"python": "X", "cores": "0-1", "port": "1"})
        assert not any("{" in part for part in (*filled.command, *filled.env.values()))
