"""What all requests share: strict JSON types, and the fields of both kinds of generation, OpenAI's and vLLM's.

The kinds themselves are in `completion_request`, `chat_request` and `text_request`, answers in `responses`.

Every field is either honoured, or has no influence on the answer (user, metadata, ...), or is refused by name unless
it says "off". Unknown fields are refused too. JSON types are strict: "5" and true are not numbers.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields import (
    LogitBias,
    MinP,
    Penalty,
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
from server.api.structured import Choices, ResponseFormat, SchemaOrText, StructuredOutputs

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

    # known, not served
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
