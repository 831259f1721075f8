"""What all requests share: strict JSON types, and the fields of both kinds of generation, OpenAI's and vLLM's.

The kinds themselves are in `completion_request`, `chat_request` and `text_request`, answers in `responses`.

Every field is either honoured, or has no influence on the answer (user, metadata, ...), or is refused by name unless
it says "off". Unknown fields are refused too. JSON types are strict: "5" and true are not numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from server.api.fields import (
    MAX_ALLOWED_IDS,
    MAX_BAD_WORDS,
    MAX_NAMED_IDS,
    BadWord,
    LogitBias,
    Logprobs,
    MinP,
    Penalty,
    Priority,
    PromptLimit,
    RepetitionPenalty,
    RequestId,
    Salt,
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
from server.api.structured import Choices, ResponseFormat, SchemaOrText, StructuredOutputs

Off = Annotated[Any, not_served(False)]
Absent = Annotated[Any, not_served()]
NoneListed = Annotated[Any, not_served([])]


def refusal(param: str, message: str) -> PydanticCustomError:
    """The error of a field that does not go with the others."""
    return PydanticCustomError(param, message, {"param": param})


class Strict(BaseModel):
    """Base of all request models."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


def of_kind(value: Any, kinds: dict[Any, type[Strict]], what: str) -> Any:
    """The value as the model of its `type`, so that errors name fields of that one alone."""
    if not isinstance(value, dict):
        return value
    kind = value.get("type")
    model = kinds.get(kind) if kind is None or isinstance(kind, str) else None
    if model is not None:
        return model.model_validate(value)
    served = ", ".join(name for name in kinds if name is not None)
    error = PydanticCustomError(
        "not_served", "{what} of this type are not served; {served} are", {"what": what, "served": served}
    )
    details = InitErrorDetails(type=error, loc=("type",), input=kind)
    raise ValidationError.from_exception_data(what, [details])


class StreamOptions(Strict):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Off = None

    @model_validator(mode="after")
    def _continuous_usage_is_usage(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise refusal("stream_options.continuous_usage_stats", "continuous_usage_stats needs include_usage: true")
        return self


class PromptOptions(Strict):
    """What may be said of a prompt, whatever becomes of it."""

    truncate_prompt_tokens: PromptLimit | None = None
    truncation_side: Literal["left", "right"] | None = None
    priority: Priority | None = None
    cache_salt: Salt | None = None

    @model_validator(mode="after")
    def _truncation_has_a_limit(self) -> PromptOptions:
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise refusal("truncation_side", "truncation_side needs truncate_prompt_tokens")
        if self.truncate_prompt_tokens == 0:
            raise refusal("truncate_prompt_tokens", "0 would leave no prompt; send the tokens to keep, or -1")
        return self


class GenerationBody(PromptOptions):
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
    allowed_token_ids: list[TokenId] | None = Field(None, min_length=1, max_length=MAX_ALLOWED_IDS)
    bad_words: list[BadWord] | None = Field(None, max_length=MAX_BAD_WORDS)
    # ending
    min_tokens: TokenCount | None = None
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_NAMED_IDS)
    ignore_eos: bool | None = None
    # what stands beside the text
    prompt_logprobs: Logprobs | None = None
    logprob_token_ids: list[TokenId] | None = Field(None, min_length=1, max_length=MAX_NAMED_IDS)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    # the text
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    request_id: RequestId | None = None  # the end of the answer's id

    # what the text must match: one of these
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    # without influence on the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = None

    # known, not served
    service_tier: Annotated[Any, not_served("auto", "default")] = None
    store: Off = None
    prompt_cache_retention: Absent = None
    use_beam_search: Off = None
    length_penalty: Annotated[Any, not_served(1.0, 1)] = None
    early_stopping: Off = None
    prompt_embeds: Absent = None
    repetition_detection: Absent = None
    thinking_token_budget: Annotated[Any, not_served(-1)] = None
    stream_interval: Annotated[Any, not_served(1)] = None
    vllm_xargs: Annotated[Any, not_served({})] = None
    kv_transfer_params: Absent = None

    @model_validator(mode="after")
    def _what_needs_what(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", "stream_options needs stream: true")
        if self.stream and self.prompt_logprobs is not None:
            raise refusal("prompt_logprobs", "prompt_logprobs are not sent in streams; leave out stream")
        return self
