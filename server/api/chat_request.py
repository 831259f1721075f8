"""The body of POST /v1/chat/completions: messages, and how to render and answer them. Rendering is in `chat`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from server.api.fields import Content, Logprobs, PositiveTokenCount, TemplateVariables, Text, not_served
from server.api.protocol import Absent, GenerationBody, NoneListed, Off, Strict, refusal
from server.api.tools import MAX_TOOLS, ToolCall, ToolChoice, Tools


class ChatMessage(Strict):
    """One turn. Parts of other types than text are not served.

    A client may send back the message it was given with what it made of it: the openai clients' `parsed` says what
    `content` says, LiteLLM keeps fields it does not know in `provider_specific_fields`.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    refusal: Absent = None
    audio: Absent = None
    annotations: NoneListed = None
    function_call: Absent = None
    parsed: Any = None
    provider_specific_fields: Annotated[Any, not_served({}, {"refusal": None})] = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Text | None = None


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Refuse, by their places, parts that do not go with a message's role."""
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise refusal(f"{where}.content", "must be a string or a list of text parts")
        if message.tool_calls and message.role != "assistant":
            raise refusal(f"{where}.tool_calls", "tool calls belong to messages of the assistant")
        if (message.role == "tool") != (message.tool_call_id is not None):
            raise refusal(f"{where}.tool_call_id", "belongs to messages of the role tool, and has to be there")


class ChatInput(Strict):
    """A conversation and how to render it; /tokenize takes it too."""

    messages: list[ChatMessage] = Field(min_length=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _turns_and_their_end(self) -> ChatInput:
        check_messages(self.messages)
        if self.continue_final_message and self.add_generation_prompt:
            raise refusal(
                "continue_final_message", "continue_final_message and add_generation_prompt exclude each other"
            )
        return self


class ChatCompletionRequest(GenerationBody, ChatInput):
    """POST /v1/chat/completions."""

    max_tokens: PositiveTokenCount | None = None
    max_completion_tokens: PositiveTokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: NoneListed = None
    function_call: Annotated[Any, not_served("none", "auto")] = None
    modalities: Annotated[Any, not_served(["text"])] = None
    audio: Absent = None
    prediction: Absent = None
    web_search_options: Absent = None
    moderation: Absent = None
    reasoning_effort: Annotated[Any, not_served("none")] = None
    verbosity: Annotated[Any, not_served("medium")] = None
    echo: Off = None
    add_special_tokens: Off = None
    documents: list[dict[Text, Text]] | None = None
    chat_template: Text | None = None
    chat_template_kwargs: TemplateVariables | None = None
    mm_processor_kwargs: Absent = None

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template may use beside the messages."""
        return {**(self.chat_template_kwargs or {}), **({"documents": self.documents} if self.documents else {})}

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs needs logprobs: true")
        if self.logprob_token_ids is not None and not self.logprobs:
            raise refusal("logprob_token_ids", "logprob_token_ids needs logprobs: true")
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise refusal("max_tokens", "max_tokens and max_completion_tokens differ; send only max_completion_tokens")
        return self
