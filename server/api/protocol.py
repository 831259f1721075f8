"""Requests as OpenAI defines them, plus vLLM's sampling extensions. Responses are in `server.api.responses`.

Every field is either honoured, or has no influence on the answer (user, metadata, ...), or is refused by name unless
it says "off". Unknown fields are refused too. JSON types are strict: "5" and true are not numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields import (
    Content,
    LogitBias,
    Logprobs,
    MinP,
    Penalty,
    PositiveTokenCount,
    Prompts,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Text,
    TokenCount,
    TokenId,
    TopK,
    TopP,
    not_served,
)

Off = Annotated[Any, not_served(False)]
Absent = Annotated[Any, not_served()]
NoneListed = Annotated[Any, not_served([])]


class Strict(BaseModel):
    """Base of all request models."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class StreamOptions(Strict):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    include_obfuscation: Off = None
    continuous_usage_stats: Off = None


class GenerationBody(Strict):
    """What completions and chat completions share."""

    model: str
    n: int | None = Field(None, ge=1, le=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # sampling
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: Seed | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias = Field(default_factory=dict)
    # ending
    min_tokens: TokenCount | None = None
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None

    # without influence on the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # known, not served
    response_format: Annotated[Any, not_served({"type": "text"})] = None
    service_tier: Annotated[Any, not_served("auto", "default")] = None
    store: Off = None
    prompt_cache_retention: Absent = None
    use_beam_search: Off = None
    length_penalty: Annotated[Any, not_served(1.0, 1)] = None
    early_stopping: Off = None
    include_stop_str_in_output: Off = None
    skip_special_tokens: Annotated[Any, not_served(True)] = None
    spaces_between_special_tokens: Annotated[Any, not_served(True)] = None
    truncate_prompt_tokens: Absent = None
    prompt_logprobs: Absent = None
    allowed_token_ids: NoneListed = None
    bad_words: NoneListed = None
    priority: Annotated[Any, not_served(0)] = None
    return_token_ids: Off = None
    return_tokens_as_token_ids: Off = None
    structured_outputs: Absent = None
    guided_json: Absent = None
    guided_regex: Absent = None
    guided_choice: Absent = None
    guided_grammar: Absent = None
    cache_salt: Absent = None
    kv_transfer_params: Absent = None
    request_id: Absent = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "stream_options needs stream: true", {"param": "stream_options"}
            )
        return self


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: TokenCount | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    best_of: Any = None
    suffix: Annotated[Any, not_served("")] = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError(
                "max_tokens", "max_tokens 0 needs echo: true; ask for at least 1 token", {"param": "max_tokens"}
            )
        if self.best_of is not None and (type(self.best_of) is not int or self.best_of != (self.n or 1)):
            raise PydanticCustomError(
                "not_served", "best_of is not served; leave it out or send the value of n", {"param": "best_of"}
            )
        return self


class ChatMessage(Strict):
    """One turn. Parts of other types than text, tool calls and tool results are not served."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Text | None = None
    refusal: Absent = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: NoneListed = None
    tool_call_id: Absent = None


class ChatInput(Strict):
    """A conversation and how to render it; /tokenize takes it too."""

    messages: list[ChatMessage] = Field(min_length=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _one_ending(self) -> ChatInput:
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "continue_final_message",
                "continue_final_message and add_generation_prompt exclude each other",
                {"param": "continue_final_message"},
            )
        return self


class ChatCompletionRequest(GenerationBody, ChatInput):
    """POST /v1/chat/completions."""

    max_tokens: PositiveTokenCount | None = None
    max_completion_tokens: PositiveTokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

    tools: NoneListed = None
    tool_choice: Annotated[Any, not_served("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, not_served(True)] = None
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
    documents: NoneListed = None
    chat_template: Absent = None
    chat_template_kwargs: Annotated[Any, not_served({})] = None
    mm_processor_kwargs: Absent = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true", {"param": "top_logprobs"})
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise PydanticCustomError(
                "max_tokens",
                "max_tokens and max_completion_tokens differ; send only max_completion_tokens",
                {"param": "max_tokens"},
            )
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: a text or a conversation, in vLLM's form."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "send either prompt or messages", {"param": "prompt"})
        for name in ("add_generation_prompt", "continue_final_message"):
            if self.prompt is not None and getattr(self, name) is not None:
                raise PydanticCustomError(name, "{param} needs messages", {"param": name})
        if self.messages is not None and self.add_special_tokens:
            raise PydanticCustomError(
                "add_special_tokens",
                "a chat template writes its own special tokens; add_special_tokens needs prompt",
                {"param": "add_special_tokens"},
            )
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
