"""Calls in chat answers as OpenAI has them: whole messages, and deltas of a stream.

Not the search for calls in the text (`server.api.tool_parser`), nor the items of /v1/responses
(`server.api.response_output`).
"""

from __future__ import annotations

from server.api.responses import (
    CallDelta,
    CalledFunction,
    ChatAnswer,
    ChatDelta,
    FinishReason,
    FunctionDelta,
    ToolCallAnswer,
)
from server.api.tool_parser import CallArguments, CallStart, Content, Event
from server.api.tool_use import ToolUse


class ToolAnswer:
    """One answer of a request with tools."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._parser = use.parser()
        self._num_told = 0  # calls that a stream has heard of

    def deltas(self, text: str) -> list[ChatDelta]:
        """What a stream says of the text's next piece."""
        return [self._delta(event) for event in self._parser.feed(text)]

    def last_deltas(self) -> list[ChatDelta]:
        """What is left to say at the end."""
        return [self._delta(event) for event in self._parser.end()]

    def finish(self, reason: FinishReason) -> FinishReason:
        """A text that ended by itself and called something ended with the calls."""
        return "tool_calls" if reason == "stop" and self._parser.num_calls else reason

    def message(self, text: str) -> ChatAnswer:
        """The whole answer's message."""
        events = [*self._parser.feed(text), *self._parser.end()]
        content = "".join(event.text for event in events if isinstance(event, Content))
        calls: list[ToolCallAnswer] = []
        for event in events:
            if isinstance(event, CallStart):
                function = CalledFunction(name=event.name, arguments="")
                calls.append(ToolCallAnswer(id=self._use.new_call_id(), type="function", function=function))
            elif isinstance(event, CallArguments):
                calls[-1].function.arguments += event.text
        if not calls:
            return ChatAnswer(role="assistant", content=content, refusal=None)
        return ChatAnswer(
            role="assistant", content=content if content.strip() else None, refusal=None, tool_calls=calls
        )

    def _delta(self, event: Event) -> ChatDelta:
        if isinstance(event, Content):
            return ChatDelta(content=event.text)
        if isinstance(event, CallStart):
            self._num_told += 1
        index = self._num_told - 1
        if isinstance(event, CallStart):
            function = FunctionDelta(name=event.name, arguments="")
            call = CallDelta(index=index, id=self._use.new_call_id(), type="function", function=function)
            return ChatDelta(tool_calls=[call])
        return ChatDelta(tool_calls=[CallDelta(index=index, function=FunctionDelta(arguments=event.text))])
