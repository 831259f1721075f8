"""Answers as OpenAI defines them, plus vLLM's `stop_reason`. Requests are in `server.api.protocol`.

Fields are set explicitly and dumped with `exclude_unset`, so that a field that OpenAI sends as null is null and one
that it leaves out is absent.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """Base of all response models."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def to_json(self) -> bytes:
        """The body, without unset fields."""
        return self.model_dump_json(exclude_unset=True).encode()


class PromptTokensDetails(Answer):
    """Where prompt tokens came from."""

    cached_tokens: int


class UsageTimings(Answer):
    """Where the time went, by llama.cpp's names: over all answers of the request, null where a phase was not reached.

    `prompt_n` counts tokens that were run, `cache_n` those taken from the prefix cache. The first token belongs to
    `prompt_ms`, so `predicted_per_second` is that of the others.
    """

    queue_ms: float | None
    cache_n: int
    prompt_n: int
    prompt_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float | None
    predicted_per_second: float | None


class Usage(Answer):
    """Tokens, as billed and as counted by the metrics; times where X-Include-Timings asked for them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    timings: UsageTimings | None = None


class CompletionLogprobs(Answer):
    """One entry per token, parallel lists; None where nothing precedes the token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Answer):
    """A token at a place of the prompt; rank 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionChoice(Answer):
    """A continuation, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(Answer):
    """Answer of /v1/completions and each of its chunks."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Answer):
    """A candidate at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The token at a position and the best candidates."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None


class CalledFunction(Answer):
    """A call's function; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCallAnswer(Answer):
    """A call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(Answer):
    """What a call's function gained."""

    name: str | None = None
    arguments: str


class CallDelta(Answer):
    """What the call of an index gained; id, type and name come first and once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatAnswer(Answer):
    """The assistant's message; content is None where it only calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallAnswer] | None = None


class ChatDelta(Answer):
    """A piece of the assistant's message; empty in the finish chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChoice(Answer):
    """A finished message."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatChunkChoice(Answer):
    """A piece of a message."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | None = None


class ChatCompletionChunk(Answer):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(Answer):
    """A served name. `spq` holds the limits in force and the memory they were made from."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    spq: dict[str, Any]


class ModelList(Answer):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeAnswer(Answer):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenizerInfo(Answer):
    """Answer of /tokenizer_info: these and what else the model's tokenizer_config.json says."""

    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str
    vocab_size: int
    added_tokens_decoder: dict[str, dict[str, str | bool]]


class DetokenizeAnswer(Answer):
    """Answer of /detokenize."""

    prompt: str


class Readiness(Answer):
    """Answer of /ready; `progress` (0..1) and `eta_s` are of the phase."""

    phase: str
    progress: float
    detail: str
    elapsed_s: float
    eta_s: float | None


class ErrorDetail(Answer):
    """What went wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """The body of every failure, on every route."""

    error: ErrorDetail
