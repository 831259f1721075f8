"""The items of `input` of /v1/responses, and the chat messages that they are.

Messages, calls of functions and their results. Others (files, reasoning, calls of OpenAI's own tools) are refused by
name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.api.chat_request import ChatMessage
from server.api.fields import Content, Text, check_text
from server.api.protocol import Absent, Strict, of_kind
from server.api.tools import FUNCTION_NAME, CalledFunction, ToolCall

TEXT_PARTS = ("input_text", "output_text", "text")

CallId = Annotated[str, Field(min_length=1, max_length=256)]


def _plain_parts(value: Any) -> Any:
    """Parts as a chat has them: what an output part carries beside its text says nothing to the model."""
    if not isinstance(value, list):
        return value
    plain = []
    for part in value:
        known = isinstance(part, dict) and part.get("type") in TEXT_PARTS
        extra = set(part) - {"type", "text", "annotations", "logprobs"} if known else set()
        plain.append({"type": "text", "text": part.get("text")} if known and not extra else part)
    return plain


def _check_arguments(value: str) -> str:
    try:
        arguments = json.loads(check_text(value) or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise PydanticCustomError("arguments", "must be a string that holds a JSON object")
    return value


class InputMessage(Strict):
    """A turn."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Content, BeforeValidator(_plain_parts)]
    id: str | None = None
    status: str | None = None
    phase: Absent = None


class FunctionCallInput(Strict):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    arguments: Annotated[str, BeforeValidator(_check_arguments)]
    id: str | None = None
    status: str | None = None
    namespace: Absent = None
    caller: Absent = None


class FunctionCallOutput(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Annotated[Content, BeforeValidator(_plain_parts)]
    name: Text | None = None
    id: str | None = None
    status: str | None = None
    namespace: Absent = None
    caller: Absent = None


_KINDS: dict[Any, type[Strict]] = {
    None: InputMessage,
    "message": InputMessage,
    "function_call": FunctionCallInput,
    "function_call_output": FunctionCallOutput,
}


def _item(value: Any) -> Any:
    return of_kind(value, _KINDS, "items")


InputItem = Annotated[InputMessage | FunctionCallInput | FunctionCallOutput, BeforeValidator(_item)]


def to_messages(items: Sequence[InputMessage | FunctionCallInput | FunctionCallOutput]) -> list[ChatMessage]:
    """Turns of a chat: calls that follow each other, and the assistant's text beside them, are one."""
    messages: list[ChatMessage] = []
    for item in items:
        if isinstance(item, InputMessage):
            calling = messages[-1] if item.role == "assistant" and messages and messages[-1].tool_calls else None
            if calling is None:
                messages.append(ChatMessage(role=item.role, content=item.content))
            else:
                messages[-1] = calling.model_copy(update={"content": (calling.content or "") + item.content})
        elif isinstance(item, FunctionCallOutput):
            messages.append(ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id, name=item.name))
        else:
            function = CalledFunction(name=item.name, arguments=item.arguments)
            call = ToolCall(id=item.call_id, type="function", function=function)
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatMessage(role="assistant"))
            turn = messages[-1]
            messages[-1] = turn.model_copy(update={"tool_calls": [*(turn.tool_calls or ()), call]})
    return messages


def unknown_output(
    items: Sequence[InputMessage | FunctionCallInput | FunctionCallOutput], earlier: Sequence[ChatMessage]
) -> int | None:
    """The place of the first result of a call that was not made before it; None where there is none."""
    made = {call.id for message in earlier for call in message.tool_calls or ()}
    for i, item in enumerate(items):
        if isinstance(item, FunctionCallInput):
            made.add(item.call_id)
        elif isinstance(item, FunctionCallOutput) and item.call_id not in made:
            return i
    return None
