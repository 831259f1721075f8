"""Chunks made from a template have the bytes of those that the response models make."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.api.chunks import TextChunks
from server.api.responses import ChatChunkChoice, ChatCompletionChunk, ChatDelta, Completion, CompletionChoice
from server.api.sse import event


def completion(index: int, text: str, **usage: None) -> bytes:
    choice = CompletionChoice(index=index, text=text, logprobs=None, finish_reason=None, stop_reason=None)
    return Completion(
        id="cmpl-1", object="text_completion", created=1, model='m"\\é', choices=[choice], **usage
    ).to_json()


def chat(index: int, text: str, **usage: None) -> bytes:
    choice = ChatChunkChoice(index=index, delta=ChatDelta(content=text), logprobs=None, finish_reason=None)
    return ChatCompletionChunk(
        id="chatcmpl-1", object="chat.completion.chunk", created=1, model="m", choices=[choice], **usage
    ).to_json()


@given(st.lists(st.tuples(st.integers(0, 3), st.text(min_size=1)), min_size=1, max_size=5), st.booleans())
def test_bytes_are_those_of_the_models(pieces: list[tuple[int, str]], with_usage: bool) -> None:
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    for make in (completion, chat):
        chunks = TextChunks(lambda index, text, make=make: make(index, text, **usage))  # type: ignore[misc]
        for index, text in pieces:
            assert chunks.event(index, text) == event(make(index, text, **usage))


def test_every_control_character_survives(bench: Any, read_events: Any) -> None:
    bench.script.text = "".join(map(chr, range(128))) + "é漢\U0001f600\u2028"
    bench.script.burst = 7
    for response in (bench.complete(stream=True, max_tokens=150), bench.chat(stream=True, max_tokens=150)):
        choices = [e["choices"][0] for e in read_events(response) if e != "[DONE]"]
        text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
        assert text == bench.script.text
        assert all(json.dumps(c) for c in choices)


def test_tokens_that_came_together_are_events_of_their_own(bench: Any, read_events: Any) -> None:
    bench.script.text, bench.script.burst = "abcdef", 4
    events = read_events(bench.complete(stream=True))
    assert [e["choices"][0]["text"] for e in events[:-1]] == [*"abcdef", ""]


def test_what_came_after_a_stop_string_is_neither_sent_nor_counted(bench: Any, read_events: Any) -> None:
    bench.script.text, bench.script.burst = "abcdef", 30
    body = {"stream": True, "stop": "cd", "stream_options": {"include_usage": True}}
    events = read_events(bench.complete(**body))
    assert "".join(e["choices"][0]["text"] for e in events[:-2]) == "ab"
    assert events[-2]["usage"]["completion_tokens"] == 4
    assert bench.metric("vllm:generation_tokens_total") == 4
