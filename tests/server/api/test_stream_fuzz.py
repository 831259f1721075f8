"""Event streams for every client: any text, any failure, any cutting by the network, read by independent parsers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from anthropic._streaming import SSEDecoder as AnthropicDecoder
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder as OpenAIDecoder
from pydantic_core import to_json

from server.api.chunks import TextChunks
from server.api.sse import DONE, EventStream, event
from server.core import FinishReason
from server.errors import EngineError
from tests.fuzzing import examples
from tests.server.api.named_events import message_of

# What breaks framings: all that some parser takes for a line's end, marks of the protocol, pieces of emoji, NUL.
NASTY = st.sampled_from(
    ["\n", "\r", "\r\n", "\n\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\0", "data: ", "data: [DONE]",
     ":", '"', "\\", "\\n", "event: error", "id: 1", "retry: 1", "\ufeff", "\ufffd", "👩\u200d👧🏽", "e\u0301",
     "\U00020000", "</script>", " ", "a", "b"]
)  # fmt: skip
texts = st.one_of(st.lists(NASTY, max_size=8).map("".join), st.text(max_size=6))
values = st.one_of(texts, st.lists(texts, max_size=2), st.dictionaries(texts, st.one_of(texts, st.none()), max_size=2))


Found = tuple[str, str]  # name of an event, "" where it has none, and its data


def by_the_standard(pieces: list[bytes]) -> Iterator[Found]:
    """Each event, by the parsing rules of the HTML standard (9.2.6), however the bytes were cut."""
    text = b"".join(pieces).decode("utf-8").removeprefix("\ufeff")
    name = ""
    data: list[str] = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        if not line:
            if data:
                yield name, "\n".join(data)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))
        elif field == "event":
            name = value.removeprefix(" ")
        assert field in ("data", "event", ""), f"a field that we never send: {field}"
    assert not data and not name, "the stream ends inside an event"


def by_a_client(decoder: OpenAIDecoder | AnthropicDecoder, pieces: list[bytes]) -> Iterator[Found]:
    """The same by an official client's own decoder, fed as the network cut it."""
    for found in decoder.iter_bytes(iter(pieces)):
        assert not found.id and found.retry is None
        yield found.event or "", found.data


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


def read(data: bytes, places: list[int], *, named: bool = False) -> list[Any]:
    """The payloads, on which all parsers must agree; [DONE] as it is. A name is the type that the data tells too."""
    pieces = cut(data, places)
    found = list(by_the_standard(pieces))
    for decoder in (OpenAIDecoder(), AnthropicDecoder()):
        assert list(by_a_client(decoder, pieces)) == found
    payloads = [payload if payload == "[DONE]" else json.loads(payload) for _, payload in found]
    assert [name for name, _ in found] == [payload["type"] if named else "" for payload in payloads]
    return payloads


async def body_of(stream: EventStream) -> bytes:
    """Every byte that the response sends."""
    sent: list[bytes] = []
    ended = False

    async def send(message: Any) -> None:
        nonlocal ended
        sent.append(message.get("body", b""))
        ended = message["type"] == "http.response.body" and not message["more_body"]

    async def receive() -> Any:
        await asyncio.Event().wait()

    await stream({}, receive, send)
    assert ended
    return b"".join(sent)


cuts = st.lists(st.integers(0, 100_000), max_size=9)


@examples(50)
@given(st.lists(values, min_size=1, max_size=6), st.one_of(st.none(), texts), cuts)
def test_any_events_and_any_failure_arrive_as_they_were(payloads: list[Any], failure: str | None, places: Any) -> None:
    async def events() -> AsyncGenerator[bytes]:
        for payload in payloads:
            yield event(to_json(payload))
        if failure is not None:
            raise EngineError(failure)
        yield DONE

    found = read(asyncio.run(body_of(EventStream(events()))), places)
    assert found[:-1] == payloads
    if failure is None:
        assert found[-1] == "[DONE]"
    else:
        assert found[-1]["error"]["message"] == failure and found[-1]["error"]["code"] == "engine_error"


@examples(50)
@given(st.lists(st.tuples(st.integers(0, 2), texts), min_size=1, max_size=6), cuts)
def test_chunks_from_a_template_arrive_as_they_were(pieces: list[tuple[int, str]], places: Any) -> None:
    chunks = TextChunks(lambda index, text: json.dumps({"i": index, "t": text, "u": "\u2028"}).encode())
    data = b"".join(chunks.event(index, text) for index, text in pieces)
    assert [(e["i"], e["t"]) for e in read(data, places)] == pieces


def text_of(events: list[Any], path: str) -> str:
    if path == "/v1/responses":
        return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    if path == "/v1/messages":
        return "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    choices = [e["choices"][0] for e in events if e != "[DONE]" and e.get("choices")]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


def text_of_whole(answer: dict[str, Any], path: str) -> str:
    """Of an answer that was not streamed."""
    if path == "/v1/responses":
        return "".join(part["text"] for item in answer["output"] for part in item["content"])
    if path == "/v1/messages":
        return "".join(block["text"] for block in answer["content"])
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"] or "")


def first_cut(text: str, stops: list[str]) -> str:
    """The definition: the stop that completes first ends the text where it begins; of several, the longest."""
    hits = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    return text if not hits else text[: sum(min(hits))]


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "say", "max_tokens": 150},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "say"}], "max_tokens": 150},
    "/v1/responses": {"input": "say", "max_output_tokens": 150},
    "/v1/messages": {"messages": [{"role": "user", "content": "say"}], "max_tokens": 150},
}
NAMED = ("/v1/responses", "/v1/messages")  # whose events have names
stop_lists = st.lists(st.one_of(NASTY, st.text("ab\n👧é", min_size=1, max_size=3)), max_size=3)


@examples(25)
@given(texts.filter(lambda t: len(t.encode()) < 150), stop_lists, st.integers(1, 9), st.booleans(), cuts)
def test_a_streamed_answer_is_the_text_cut_at_the_stop(
    bench: Any, text: str, stops: list[str], burst: int, fails: bool, places: Any
) -> None:
    # Every token is a byte, so all but ASCII is split over tokens; `burst` of them come at once.
    bench.script.text, bench.script.burst = text, burst
    fails = fails and text != ""  # an engine fails at a token
    bench.script.end = FinishReason.ERROR if fails else FinishReason.STOP
    wanted = first_cut(text, stops)
    for path, body in BODIES.items():
        field = "stop_sequences" if path == "/v1/messages" else "stop"
        asked = {"model": "tiny", **body, **({field: stops} if stops else {})}
        answer = bench.post(path, {**asked, "stream": True})
        if not answer.headers["content-type"].startswith("text/event-stream"):
            assert fails and answer.status_code == 500, answer.text
            continue
        events = read(answer.content, places, named=path in NAMED)
        found = text_of(events, path)
        stopped = any(stop in text for stop in stops)
        if fails and not stopped:
            assert text.startswith(found) and "error" in str(events[-1])
            continue
        assert found == wanted, path
        whole = bench.post(path, asked).json()
        assert text_of_whole(whole, path) == wanted, path
        if path == "/v1/messages":
            assert message_of(events) | {"id": whole["id"]} == whole
