"""The output of one response as its text grows: messages and calls, and the events that tell of them.

Text in, items and events out; no numbers of events and no HTTP (`server.api.responses_api`). Without tools there is one
message from the start. With them a message begins with its first text, and one more with text behind calls.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from server.api.answer import Delta, TokenEntry
from server.api.chat_request import ChatMessage
from server.api.response_answer import FunctionCall, OutputMessage, OutputText, Status
from server.api.responses import ChatTokenLogprob
from server.api.tool_parser import CallStart, Content
from server.api.tool_parser import Event as ToolEvent
from server.api.tool_use import ToolUse
from server.api.tools import CalledFunction, ToolCall

Event = tuple[str, dict[str, Any]]  # type, fields


def new_item_id(prefix: str) -> str:
    """An id of OpenAI's shape."""
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseOutput:
    """`items` are those that are complete. `score` makes the log-probabilities of tokens, none where nobody asked."""

    def __init__(self, use: ToolUse | None, score: Callable[[Sequence[TokenEntry]], list[ChatTokenLogprob]]) -> None:
        self.items: list[OutputMessage | FunctionCall] = []
        self._use = use
        self._parser = None if use is None else use.parser()
        self._score = score
        self._open: OutputMessage | FunctionCall | None = None
        self._entries: list[TokenEntry] = []  # of tokens whose text was not said yet

    def begin(self) -> list[Event]:
        """What is known before the first token."""
        return self._open_message() if self._parser is None else []

    def feed(self, delta: Delta) -> list[Event]:
        """Take in what the answer gained."""
        self._entries += delta.entries
        if self._parser is None:
            return self._say(delta.text) if delta.text else []
        return [event for found in self._parser.feed(delta.text) for event in self._take(found)]

    def end(self, status: Status) -> list[Event]:
        """The answer has ended; `status` is that of its last item."""
        events = [] if self._parser is None else [e for found in self._parser.end() for e in self._take(found)]
        if self._open is None and not self.items:
            events += self._open_message()
        return events + self._close(status)

    def to_message(self) -> ChatMessage:
        """The items as the assistant's turn of a chat."""
        texts = [part.text for item in self.items if isinstance(item, OutputMessage) for part in item.content]
        calls = [
            ToolCall(
                id=item.call_id,
                type="function",
                function=CalledFunction(name=item.name, arguments=item.arguments),
            )
            for item in self.items
            if isinstance(item, FunctionCall)
        ]
        if not calls:
            return ChatMessage(role="assistant", content="".join(texts))
        return ChatMessage(role="assistant", content="".join(texts) or None, tool_calls=calls)

    def _take(self, found: ToolEvent) -> list[Event]:
        if isinstance(found, Content):
            return self._say(found.text)
        self._entries = []  # of what is no text
        if isinstance(found, CallStart):
            return self._open_call(found.name)
        assert isinstance(self._open, FunctionCall), "arguments follow the start of their call"
        self._open.arguments += found.text
        return [("response.function_call_arguments.delta", {"delta": found.text, **self._place(self._open)})]

    def _say(self, text: str) -> list[Event]:
        events = [] if isinstance(self._open, OutputMessage) else self._open_message()
        assert isinstance(self._open, OutputMessage), "a message is open"
        [part] = self._open.content
        scores = self._score(self._entries)
        self._entries = []
        part.text += text
        part.logprobs += scores
        return [*events, ("response.output_text.delta", {"delta": text, "logprobs": scores, **self._text_place()})]

    def _open_message(self) -> list[Event]:
        events = self._close("completed")
        self._open = OutputMessage(id=new_item_id("msg"), status="in_progress", content=[])
        events.append(self._added())
        self._open.content.append(OutputText(text=""))
        return [*events, ("response.content_part.added", {"part": OutputText(text=""), **self._text_place()})]

    def _open_call(self, name: str) -> list[Event]:
        assert self._use is not None, "only tools can be called"
        events = self._close("completed")
        call_id = self._use.new_call_id()
        self._open = FunctionCall(id=new_item_id("fc"), call_id=call_id, name=name, arguments="", status="in_progress")
        return [*events, self._added()]

    def _close(self, status: Status) -> list[Event]:
        item = self._open
        if item is None:
            return []
        item.status = status
        done = ("response.output_item.done", {"output_index": len(self.items), "item": item})
        if isinstance(item, FunctionCall):
            events: list[Event] = [
                ("response.function_call_arguments.done", {"arguments": item.arguments, **self._place(item)})
            ]
        else:
            [part] = item.content
            part.logprobs += self._score(self._entries)  # of tokens without text, the end's
            place = self._text_place()
            events = [
                ("response.output_text.done", {"text": part.text, "logprobs": part.logprobs, **place}),
                ("response.content_part.done", {"part": part, **place}),
            ]
        self._entries = []
        self.items.append(item)
        self._open = None
        return [*events, done]

    def _added(self) -> Event:
        assert self._open is not None, "an item was opened"
        return "response.output_item.added", {
            "output_index": len(self.items),
            "item": self._open.model_copy(deep=True),
        }

    def _place(self, item: OutputMessage | FunctionCall) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": len(self.items)}

    def _text_place(self) -> dict[str, Any]:
        assert self._open is not None, "a message is open"
        return {**self._place(self._open), "content_index": 0}
