"""From a request body and a prompt's length to `SamplingParams`, with the limits of this model checked.

Order of precedence: the request, the model's generation_config.json, OpenAI's default. Decided by `is None`, never by
truth, because 0 is a temperature.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from server.api.fields import INT64
from server.api.protocol import GenerationBody
from server.core import SamplingParams
from server.engine.engine import ModelInfo
from server.errors import TOO_LONG, BadRequest
from server.tokenizer import SamplingDefaults

T = TypeVar("T")

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for completions without max_tokens


def first_given(*values: T | None, default: T) -> T:
    """The first value that is not None."""
    return next((value for value in values if value is not None), default)


def check_prompt(ids: Sequence[int], info: ModelInfo, *, param: str) -> None:
    """Raise BadRequest for an empty prompt or an id that the model does not have."""
    if not ids:
        raise BadRequest("the prompt has no tokens; send at least one", param=param)
    check_ids(ids, info, param=param)


def check_ids(ids: Iterable[int], info: ModelInfo, *, param: str) -> None:
    """Raise BadRequest for an id that the model does not have."""
    outside = next((token_id for token_id in ids if not 0 <= token_id < info.vocab_size), None)
    if outside is not None:
        raise BadRequest(f"token id {outside} is outside the vocabulary of {info.vocab_size}", param=param)


def resolve_max_tokens(
    asked: int | None, *, default: int | None, num_prompt_tokens: int, info: ModelInfo, param: str, prompt_param: str
) -> int:
    """Tokens the answer may have. `default` None: as many as fit. Raises BadRequest where it cannot fit."""
    limit = info.max_model_len
    room = limit - num_prompt_tokens
    needed = 1 if asked is None else asked
    if room < min(needed, 1):
        raise BadRequest(
            f"{TOO_LONG} {limit} tokens for prompt and answer, and the prompt has {num_prompt_tokens}; "
            "shorten the prompt",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if needed > room:
        raise BadRequest(
            f"{TOO_LONG} {limit} tokens, and the prompt's {num_prompt_tokens} and {param} {needed} are "
            f"{num_prompt_tokens + needed} together; ask for {room} or fewer, or shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


def build_params(
    body: GenerationBody,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    bad_words: tuple[tuple[int, ...], ...],
    defaults: SamplingDefaults,
    info: ModelInfo,
) -> SamplingParams:
    """The parameters of one sequence. Raises BadRequest for ids outside the vocabulary."""
    for name in ("logit_bias", "stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        check_ids(getattr(body, name) or (), info, param=name)
    stop_ids = frozenset(body.stop_token_ids or ())
    eos_ids = frozenset() if body.ignore_eos else frozenset(info.eos_token_ids)
    allowed = tuple(dict.fromkeys(body.allowed_token_ids or ()))
    min_tokens = first_given(body.min_tokens, default=0)
    if min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens {min_tokens} exceeds the {max_tokens} tokens the answer may have; lower it",
            param="min_tokens",
        )
    if min_tokens and allowed and stop_ids | eos_ids >= set(allowed):
        raise BadRequest(
            f"min_tokens {min_tokens} forbids the end, and allowed_token_ids allows nothing else", param="min_tokens"
        )
    top_k = first_given(body.top_k, defaults.top_k, default=0)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=first_given(body.temperature, defaults.temperature, default=1.0),
        top_p=first_given(body.top_p, defaults.top_p, default=1.0),
        top_k=max(0, top_k),  # -1 is vLLM's word for off
        min_p=first_given(body.min_p, default=0.0),
        seed=first_given(body.seed, default=random.randrange(-INT64, INT64)),
        repetition_penalty=first_given(body.repetition_penalty, defaults.repetition_penalty, default=1.0),
        presence_penalty=first_given(body.presence_penalty, default=0.0),
        frequency_penalty=first_given(body.frequency_penalty, default=0.0),
        logit_bias=tuple(body.logit_bias.items()),
        stop_token_ids=stop_ids,
        eos_token_ids=eos_ids,
        allowed_token_ids=allowed,
        bad_words=bad_words,
        logprobs=logprobs,
        logprob_token_ids=tuple(dict.fromkeys(body.logprob_token_ids or ())),
        prompt_logprobs=prompt_logprobs,
    )


def with_sibling_seed(params: SamplingParams, sibling: int) -> SamplingParams:
    """The parameters of the `sibling`-th of n answers: the same, but for the seed, or all n would be equal."""
    seed = (params.seed + sibling + INT64) % (2 * INT64) - INT64
    return replace(params, seed=seed)
