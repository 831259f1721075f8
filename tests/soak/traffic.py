"""Requests over raw sockets: whole, streamed, cut off at a moment, stalled, read slowly.

Not a load test of speed (`loadtest.client` is) and no client library: what is sent and when a socket closes has to be
exact.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from tests.soak.target import MODEL

WORDS = ["the", "old", "sea", "was", "calm", "and", "grey", "under", "sky", "held", "no", "promise", "of", "rain"]


@dataclass(slots=True)
class Outcome:
    """What came of a request."""

    status: int = 0  # 0: no answer
    headers: dict[str, str] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)  # of the answer, by its chunks
    text: str = ""
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # the message of an error body or event
    done: bool = False  # [DONE] came, or a whole body
    ttft_s: float | None = None
    total_s: float = 0.0


def body(draw: random.Random, max_tokens: int, *, stream: bool = True, **extra: Any) -> dict[str, Any]:
    """A completion of a prompt that no other has."""
    prompt = f"{draw.random()} " + " ".join(draw.choices(WORDS, k=draw.randint(4, 60)))
    found = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
    if stream:
        found["stream_options"] = {"include_usage": True}
    return found | extra


def head(data: bytes, *, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """The head of a POST of `data`, which may claim another length."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(data) if length is None else length}\r\n\r\n"
    ).encode()


async def ask(port: int, request: dict[str, Any]) -> Outcome:
    """Send a request and read all of its answer; what goes wrong is in the outcome."""
    found, started = Outcome(), time.monotonic()
    data = json.dumps(request).encode()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head(data) + data)
            await read_answer(reader, found, started)
        finally:
            writer.close()
    except (ConnectionError, asyncio.IncompleteReadError, ValueError) as error:
        found.error = found.error or f"{type(error).__name__}: {error}"
    found.total_s = time.monotonic() - started
    return found


async def read_answer(reader: asyncio.StreamReader, found: Outcome, started: float) -> None:
    """Fill `found` from an answer, streamed or not."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    found.status = int(lines[0].split()[1])
    found.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
    if "event-stream" not in found.headers.get("content-type", ""):
        raw = await reader.readexactly(int(found.headers.get("content-length", "0")))
        note(json.loads(raw), found, started)
        found.done = True
        return
    pending = b""
    async for part in chunks(reader):
        *events, pending = (pending + part).split(b"\n")
        for line in events:
            if line.startswith(b"data: [DONE]"):
                found.done = True
            elif line.startswith(b"data: "):
                note(json.loads(line[6:]), found, started)


def note(event: dict[str, Any], found: Outcome, started: float) -> None:
    """Take up one event or body."""
    if "error" in event:
        found.error = event["error"]["message"]
        return
    found.ids.add(event["id"])
    if event.get("usage"):
        found.completion_tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        if choice.get("text"):
            found.ttft_s = found.ttft_s if found.ttft_s is not None else time.monotonic() - started
            found.text += choice["text"]
        found.finish_reason = choice.get("finish_reason") or found.finish_reason


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of a chunked body."""
    while size := int(await reader.readline() or b"", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


def percentile(values: list[float], share: float) -> float:
    """Of sorted or unsorted values; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
