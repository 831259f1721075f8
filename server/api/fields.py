"""Field types of the request models: strict JSON types with limits, and fields we know but do not serve.

No models here. A known field that is not served accepts only the values that mean "off", so that nothing a client
asks for is silently dropped.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

INT64 = 2**63
MAX_TOKENS_LIMIT = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_NAMED_IDS = 128  # of stop_token_ids and logprob_token_ids
MAX_ALLOWED_IDS = 1024  # every step sends them to the device: 64 sequences with so many cost it 65,536 numbers
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256

# What the renderer takes itself (`transformers`' apply_chat_template), or has a field of its own here.
RENDERER_NAMES = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
})  # fmt: skip

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, le=MAX_TOKENS_LIMIT)]
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
RepetitionPenalty = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-INT64, le=INT64 - 1)]
TokenCount = Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)]
PositiveTokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS_LIMIT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Priority = Seed
PromptLimit = Annotated[int, Field(ge=-1, le=MAX_TOKENS_LIMIT)]
RequestId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")]


def same_json(left: Any, right: Any) -> bool:
    """Equality of JSON values, in which true is not 1."""
    return type(left) is type(right) and bool(left == right)


def not_served(*neutral: Any) -> BeforeValidator:
    """Marks a known field that is not served: null and the `neutral` values pass, others are refused."""

    def check(value: Any) -> Any:
        if value is None or any(same_json(value, allowed) for allowed in neutral):
            return value
        names = ", ".join(json.dumps(allowed) for allowed in neutral)
        remedy = f"leave it out or send {names}" if names else "leave it out"
        raise PydanticCustomError("not_served", "this server does not support it; {remedy}", {"remedy": remedy})

    return BeforeValidator(check)


def check_text(text: str) -> str:
    """Refuse text that UTF-8 cannot carry: JSON can spell lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "invalid_text", "the text has a lone surrogate at position {at}; send valid Unicode", {"at": error.start}
        ) from error
    return text


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("too_many_stops", "at most {n} stop strings are allowed", {"n": MAX_STOPS})
    for stop in stops:
        if not 1 <= len(check_text(stop)) <= MAX_STOP_CHARS:
            raise PydanticCustomError(
                "stop_length", "a stop string must have 1 to {n} characters", {"n": MAX_STOP_CHARS}
            )
    return stops


def _check_logit_bias(value: Any) -> Any:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias_type", "must be an object of token id to number")
    result: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10) or str(int(key)) != key:
            raise PydanticCustomError("logit_bias_key", "{key} is no token id", {"key": ascii(key)[:50]})
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError(
                "logit_bias_value", "the bias of token {key} must be a number from -100 to 100", {"key": key}
            )
        result[int(key)] = float(bias)
    return result


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)


def _check_prompt(value: Any) -> Any:
    """Normalise to a list of prompts, each a string or a list of ids."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if prompts == []:
        raise PydanticCustomError("empty_prompt", "the prompt is empty; send at least one token")
    if not isinstance(prompts, list) or not all(isinstance(p, str | list) for p in prompts):
        raise PydanticCustomError(
            "prompt_type", "must be a string, a list of strings, a list of token ids, or a list of such lists"
        )
    for prompt in prompts:
        if not prompt:
            raise PydanticCustomError("empty_prompt", "the prompt is empty; send at least one token")
        if isinstance(prompt, str):
            check_text(prompt)
        elif not _is_ids(prompt):
            raise PydanticCustomError("prompt_type", "a list of token ids must hold integers only")
    return prompts


def _check_content(value: Any) -> Any:
    """A message's text: a string, or text parts, which are joined by newlines."""
    if isinstance(value, str):
        return check_text(value)
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("content_type", "must be a string or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "content_part",
                "part {i} is not served; only {shape} parts are",
                {"i": i, "shape": '{"type": "text", "text": "..."}'},
            )
        texts.append(check_text(part["text"]))
    return "\n".join(texts)


def _check_variables(value: Any) -> Any:
    if not isinstance(value, dict):
        raise PydanticCustomError("variables_type", "must be an object")
    taken = sorted(RENDERER_NAMES & value.keys())
    if taken:
        raise PydanticCustomError("variables_name", "{name} is not for templates to be told", {"name": taken[0]})
    check_text(json.dumps(value, ensure_ascii=False))
    return value


_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        _IDS,
        {"type": "array", "items": _IDS},
    ]
}
_BIAS = {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}
_PARTS = {"type": "array", "items": {"type": "object", "required": ["type", "text"]}}

Text = Annotated[str, AfterValidator(check_text)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS), AfterValidator(check_text)]
Salt = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(check_text)]
TemplateVariables = Annotated[dict[str, Any], BeforeValidator(_check_variables)]
Stop = Annotated[list[str], BeforeValidator(_check_stop), WithJsonSchema(_STRINGS)]
LogitBias = Annotated[dict[int, float], BeforeValidator(_check_logit_bias), WithJsonSchema(_BIAS)]
Prompts = Annotated[list[str | list[int]], BeforeValidator(_check_prompt), WithJsonSchema(_PROMPT)]
Content = Annotated[str, BeforeValidator(_check_content), WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]})]
