"""The official Python client's own objects, put back into the conversation as its users do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from live import Live, serve
from pydantic import BaseModel, ConfigDict

MESSAGES: Any = [{"role": "user", "content": "The old man said"}]


class Trip(BaseModel):
    model_config = ConfigDict(extra="forbid")

    to: Literal["Oslo", "Rome"]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve() as running:
        yield running
        assert running.is_idle()


def goes_on(client: openai.OpenAI, message: Any) -> None:
    """The message is part of the next request, as the object and as a dict, and counts its tokens."""
    results = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in message.tool_calls or ()]
    short = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=2)
    for form in (message, message.model_dump()):
        history = [*MESSAGES, form, *results, *MESSAGES]
        answer = client.chat.completions.create(model="demo", messages=history, max_tokens=2)
        assert answer.usage is not None and short.usage is not None
        assert answer.usage.prompt_tokens > short.usage.prompt_tokens + 5


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["plain", "structured", "tools"])
def test_an_answer_goes_back_into_the_conversation(live: Live, kind: str, streamed: bool) -> None:
    options: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 100, "temperature": 0}
    if kind == "plain":
        options["stop"] = [","]
    elif kind == "structured":
        options["response_format"] = Trip
    elif kind == "tools":
        tools = [openai.pydantic_function_tool(Trip)]
        options |= {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    with live.client() as client:
        if streamed:
            with client.chat.completions.stream(**options) as stream:
                message = stream.get_final_completion().choices[0].message
        else:
            message = client.chat.completions.parse(**options).choices[0].message
        if kind == "structured":
            assert isinstance(message.parsed, Trip)
        elif kind == "tools":
            [call] = message.tool_calls or ()
            assert isinstance(call.function.parsed_arguments, Trip)
        goes_on(client, message)
