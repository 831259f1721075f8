"""Reading the streams of four servers however they are cut, and refusing single answers of another size.

The server here sends canned bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.client import Prompt, UnequalWork, Wave, make_prompts, run_wave
from loadtest.stream import Answer, read_event

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
