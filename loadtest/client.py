"""The one client that loads every server alike: a burst of N streamed completions, and when each token came.

Raw HTTP/1.1 on asyncio streams, no client library: it shares the cores with the server, and a library's time per chunk
would be a cost of the server's in these figures. It reads what OpenAI-compatible servers send to `POST /v1/completions`
and no more; `Wave` refuses work that was not what was asked for.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.stream import Answer, payload_of, take_event

# with its space in front, as a byte-level vocabulary writes it and as SentencePiece does
WHOLE_WORD = re.compile(r"[Ġ▁][A-Za-z]+")

SAMPLING = {"temperature": 0}  # the same for every server; what else a body says is its size and its stream


class UnequalWork(RuntimeError):
    """An answer was not of the asked length, so its time cannot be compared."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt both ways; `ids` are what a tokenizer makes of `text`."""

    text: str
    ids: list[int]


@dataclass(slots=True)
class Wave:
    """A burst of answers, from the first request sent to the last token received."""

    answers: list[Answer]
    spent_s: float
    new_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """All answers together."""
        return len(self.answers) * self.new_tokens / self.spent_s

    def check(self, prompt_tokens: int) -> None:
        """`check_sizes`, and raise UnequalWork too where tokens came in fewer chunks: gaps would not be per token."""
        self.check_sizes(prompt_tokens)
        for answer in self.answers:
            if answer.chunks < 0.9 * self.new_tokens:
                raise UnequalWork(f"{self.new_tokens} tokens came in {answer.chunks} chunks: gaps are not per token")

    def check_sizes(self, prompt_tokens: int) -> None:
        """Raise UnequalWork unless every answer was of exactly the asked size, by the server's own count."""
        for answer in self.answers:
            if answer.completion_tokens != self.new_tokens:
                raise UnequalWork(f"an answer of {answer.completion_tokens} tokens instead of {self.new_tokens}")
            if answer.finish_reason not in ("length", None):
                raise UnequalWork(f"an answer ended by {answer.finish_reason!r} instead of by its length")
            if answer.prompt_tokens != prompt_tokens:
                raise UnequalWork(f"a prompt of {answer.prompt_tokens} tokens instead of {prompt_tokens}")


def make_prompts(tokenizer: Path, count: int, tokens: int, seed: int) -> list[Prompt]:
    """Prompts of random words that are one token each, so text and ids are the same work."""
    words, draw = _whole_words(tokenizer), random.Random(seed)
    prompts = []
    for _ in range(count):
        chosen = draw.choices(words, k=tokens)
        prompts.append(Prompt("".join(text for _, text in chosen), [index for index, _ in chosen]))
    return prompts


@functools.cache
def _whole_words(tokenizer: Path) -> list[tuple[int, str]]:
    """Id and text of the words that are one token, space in front, by id."""
    vocab: dict[str, int] = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return sorted((index, " " + token[1:]) for token, index in vocab.items() if WHOLE_WORD.fullmatch(token))


async def run_wave(
    port: int,
    prompts: list[Prompt],
    new_tokens: int,
    extra: dict[str, Any],
    as_ids: bool = True,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
) -> Wave:
    """Send all prompts at once. `extra` is added to each body. Raises RuntimeError on any answer but a stream."""
    headers = b"" if api_key is None else f"Authorization: Bearer {api_key}\r\n".encode()
    bodies = [
        json.dumps(
            {
                "model": "bench",
                "prompt": prompt.ids if as_ids else prompt.text,
                "max_tokens": new_tokens,
                **SAMPLING,
                "stream": True,
                "stream_options": {"include_usage": True},
                **extra,
            }
        ).encode()
        for prompt in prompts
    ]
    started = time.perf_counter()
    answers = await asyncio.gather(*(_stream((host, port), headers, body) for body in bodies))
    return Wave(list(answers), time.perf_counter() - started, new_tokens)


async def _stream(address: tuple[str, int], headers: bytes, body: bytes) -> Answer:
    answer, last = Answer(), time.perf_counter()
    async for data in _events(address, headers, body):
        last = take_event(data, answer, last, time.perf_counter())
    return answer


async def _events(address: tuple[str, int], headers: bytes, body: bytes) -> AsyncIterator[bytes]:
    """The `data:` payloads of one POST, without the closing [DONE]."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n%s"
            b"Accept: text/event-stream\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            % (address[0].encode(), address[1], headers, len(body))
            + body
        )
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status != 200:
            raise RuntimeError(f"HTTP {status}: {(await reader.read(2000)).decode(errors='replace')}")
        parts = _chunks(reader) if b"transfer-encoding: chunked" in head.lower() else _plain(reader)
        pending = b""
        async for part in parts:
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                if (payload := payload_of(line)) is not None:
                    yield payload
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)  # CRLF


async def _plain(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(65536):
        yield part
