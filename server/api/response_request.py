"""The body of POST /v1/responses, OpenAI's newer form of a chat. It becomes a chat request; see `responses_api`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.api.chat_request import ChatCompletionRequest, ChatMessage
from server.api.fields import (
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
from server.api.protocol import Absent, Off, PromptOptions, refusal
from server.api.response_items import InputItem, to_messages
from server.api.response_tools import ResponseToolChoice, ResponseTools, to_chat_choice
from server.api.structured import TextOptions

LOGPROBS = "message.output_text.logprobs"


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponseRequest(PromptOptions):
    """POST /v1/responses."""

    model: str
    input: Annotated[list[InputItem], BeforeValidator(_as_items)] = Field(min_length=1)
    instructions: Text | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: PositiveTokenCount | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: Logprobs | None = None
    metadata: dict[str, str] | None = None

    text: TextOptions | None = None  # what the answer's text must match
    tools: ResponseTools | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None

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
    max_tool_calls: Absent = None  # counts calls of OpenAI's own tools
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
        wanted = None if self.text is None else self.text.format
        return ChatCompletionRequest(
            model=self.model,
            messages=[*system, *earlier, *self.messages],
            max_completion_tokens=self.max_output_tokens,
            logprobs=bool(self.include),
            response_format=None if wanted is None else wanted.to_response_format(),
            top_logprobs=self.top_logprobs,
            tools=None if self.tools is None else [tool.to_chat() for tool in self.tools],
            tool_choice=to_chat_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            **{name: getattr(self, name) for name in SAME_IN_CHAT},
        )

    @property
    def text_options(self) -> dict[str, Any]:
        """`text` as the response repeats it."""
        wanted = None if self.text is None else self.text.format
        if wanted is None:
            return {"format": {"type": "text"}}
        return {"format": wanted.model_dump(by_alias=True, exclude_none=True)}

    @property
    def tool_choice_said(self) -> Any:
        """`tool_choice` as the response repeats it."""
        choice = "auto" if self.tool_choice is None else self.tool_choice
        return choice if isinstance(choice, str) else choice.model_dump()

    @property
    def messages(self) -> list[ChatMessage]:
        """The new turns."""
        return to_messages(self.input)


SAME_IN_CHAT = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "stop", "ignore_eos", *PromptOptions.model_fields,
)  # fmt: skip
