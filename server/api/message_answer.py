"""Answers of /v1/messages as Anthropic has them, and the blocks of one as its text grows.

Text in, blocks and events out; no HTTP (`server.api.messages_api`).
"""

from __future__ import annotations

import json
from typing import Any, Literal

from server.api.answer import Delta
from server.api.responses import Answer
from server.api.tool_parser import CallArguments, CallStart, Content
from server.api.tool_parser import Event as ToolEvent
from server.api.tool_use import ToolUse

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
Event = tuple[str, dict[str, Any]]  # type, fields


class TextAnswer(Answer):
    """A text."""

    type: Literal["text"] = "text"
    text: str


class ToolUseAnswer(Answer):
    """A call."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answer):
    """Tokens. Those of the prompt that were found in the cache are counted apart, as there."""

    input_tokens: int
    cache_creation_input_tokens: int = 0  # the cache costs nothing here
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(Answer):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextAnswer | ToolUseAnswer]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage

    def to_json(self) -> bytes:
        """The body, with all fields."""
        return self.model_dump_json().encode()


class CountAnswer(Answer):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class Blocks:
    """The blocks of one answer. White space before a call is no block: no other server shows it."""

    def __init__(self, use: ToolUse | None) -> None:
        self.content: list[TextAnswer | ToolUseAnswer] = []  # those that are complete, but for the last
        self._use = use
        self._parser = None if use is None else use.parser()
        self._is_open = False
        self._arguments = ""  # of the last block, where it is a call
        self._blank = ""  # not said yet

    def feed(self, text: str) -> list[Event]:
        """Take in what the answer gained."""
        if self._parser is None:
            return self._say(text) if text else []
        return [event for found in self._parser.feed(text) for event in self._take(found)]

    def end(self) -> list[Event]:
        """The answer has ended. A call whose arguments are cut off is told of in the stream alone."""
        events = [] if self._parser is None else [e for found in self._parser.end() for e in self._take(found)]
        if not self.content and self._blank:
            events += self._open(TextAnswer(text=""))
            events += self._append(self._blank)
        return events + self._close()

    def stop(self, last: Delta) -> tuple[StopReason, str | None]:
        """Why it ended, and by which of the stop sequences."""
        if last.finish_reason == "length":
            return "max_tokens", None
        if isinstance(last.stop_reason, str):
            return "stop_sequence", last.stop_reason
        return ("tool_use" if any(isinstance(b, ToolUseAnswer) for b in self.content) else "end_turn"), None

    def _take(self, found: ToolEvent) -> list[Event]:
        if isinstance(found, Content):
            return self._say(found.text)
        if isinstance(found, CallArguments):
            return self._append(found.text)
        assert isinstance(found, CallStart) and self._use is not None
        self._blank = ""
        return self._open(ToolUseAnswer(id=self._use.new_call_id(), name=found.name, input={}))

    def _say(self, text: str) -> list[Event]:
        if self._is_open and isinstance(self.content[-1], TextAnswer):
            return self._append(text)
        self._blank += text
        if self._use is not None and not self._blank.strip():
            return []
        text, self._blank = self._blank, ""
        return [*self._open(TextAnswer(text="")), *self._append(text)]

    def _open(self, block: TextAnswer | ToolUseAnswer) -> list[Event]:
        events = self._close()
        self.content.append(block)
        self._is_open, self._arguments = True, ""
        started = {"index": len(self.content) - 1, "content_block": block.model_copy()}
        return [*events, ("content_block_start", started)]

    def _append(self, text: str) -> list[Event]:
        block = self.content[-1]
        if isinstance(block, TextAnswer):
            block.text += text
            delta = {"type": "text_delta", "text": text}
        else:
            self._arguments += text
            delta = {"type": "input_json_delta", "partial_json": text}
        return [("content_block_delta", {"index": len(self.content) - 1, "delta": delta})]

    def _close(self) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        stopped: Event = ("content_block_stop", {"index": len(self.content) - 1})
        block = self.content[-1]
        if isinstance(block, ToolUseAnswer):
            try:
                block.input = json.loads(self._arguments or "{}")
            except ValueError:  # only the last one can be cut
                self.content.pop()
        return [stopped]
