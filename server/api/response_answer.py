"""Answers and events of /v1/responses, as OpenAI defines them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.api.responses import Answer, ChatTokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[ChatTokenLogprob] = Field(default_factory=list)


class OutputMessage(Answer):
    """The model's turn."""

    type: Literal["message"] = "message"
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCall(Answer):
    """A call of a function; `arguments` is JSON as the model wrote it, cut off where the status is incomplete."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str  # what its result has to name
    name: str
    arguments: str
    status: Status


class OfferedFunction(Answer):
    """A tool as the response repeats it."""

    type: Literal["function"] = "function"
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class InputDetails(Answer):
    """Of input tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0  # OpenAI bills them; here the cache costs nothing


class OutputDetails(Answer):
    """Of output tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(Answer):
    """Tokens, as counted by the metrics."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why an answer is cut."""

    reason: Literal["max_output_tokens"]


class ResponseObject(Answer):
    """Answer of /v1/responses, and what its first and last events carry."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: Literal[False] = False
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | FunctionCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    text: dict[str, Any] = Field(default_factory=lambda: {"format": {"type": "text"}})
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any]
    tools: list[OfferedFunction]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None

    def to_json(self) -> bytes:
        """The body with every field: OpenAI leaves none out."""
        return self.model_dump_json().encode()


class Deleted(Answer):
    """Answer of DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
