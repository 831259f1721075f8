"""The body of POST /v1/responses, OpenAI's newer form of a chat. It becomes a chat request; see `responses_api`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.api.chat_request import ChatCompletionRequest, ChatMessage
from server.api.fields import (
    Content,
    Logprobs,
    MinP,
    Penalty,
    PositiveTokenCount,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Text,
    TopK,
    TopP,
    not_served,
)
from server.api.protocol import Absent, NoneListed, Off, PromptOptions, Strict, refusal

PLAIN_TEXT = {"format": {"type": "text"}}
TEXT_PARTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"


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


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class InputMessage(Strict):
    """A turn. Other items (files, tool calls and their results, reasoning) are not served."""

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Content, BeforeValidator(_plain_parts)]
    id: str | None = None
    status: str | None = None


class ResponseRequest(PromptOptions):
    """POST /v1/responses."""

    model: str
    input: Annotated[list[InputMessage], BeforeValidator(_as_items)] = Field(min_length=1)
    instructions: Text | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: PositiveTokenCount | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Logprobs | None = None
    metadata: dict[str, str] | None = None

    # sampling
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: Stop = Field(default_factory=list)
    ignore_eos: bool | None = None

    # without influence on the answer
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # known, not served
    text: Annotated[Any, not_served({}, PLAIN_TEXT, {**PLAIN_TEXT, "verbosity": "medium"})] = None
    tools: NoneListed = None
    tool_choice: Annotated[Any, not_served("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, not_served(True)] = None
    max_tool_calls: Absent = None
    reasoning: Annotated[Any, not_served({})] = None
    truncation: Annotated[Any, not_served("disabled")] = None
    service_tier: Annotated[Any, not_served("auto", "default")] = None
    background: Off = None
    conversation: Absent = None
    prompt: Absent = None
    moderation: Absent = None
    stream_options: Annotated[Any, not_served({}, {"include_obfuscation": False})] = None
    prompt_cache_retention: Absent = None

    @model_validator(mode="after")
    def _logprobs_are_included(self) -> ResponseRequest:
        if self.top_logprobs is not None and not self.include:
            raise refusal("top_logprobs", f'top_logprobs needs include: ["{LOGPROBS}"]')
        return self

    def to_chat(self, earlier: list[ChatMessage]) -> ChatCompletionRequest:
        """The same as a chat behind the messages of an earlier response; its instructions are not carried over."""
        system = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        return ChatCompletionRequest(
            model=self.model,
            messages=[*system, *earlier, *self.messages],
            max_completion_tokens=self.max_output_tokens,
            logprobs=bool(self.include),
            top_logprobs=self.top_logprobs,
            **{name: getattr(self, name) for name in SAME_IN_CHAT},
        )

    @property
    def messages(self) -> list[ChatMessage]:
        """The new turns."""
        return [ChatMessage(role=item.role, content=item.content) for item in self.input]


SAME_IN_CHAT = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "stop", "ignore_eos", *PromptOptions.model_fields,
)  # fmt: skip
