"""From a validated body and its prompts to a `Plan`: what chat and completions do alike before they generate.

Sampling parameters are made in `server.api.sampling`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from server.api.answer import Plan, Prompt
from server.api.deps import new_id
from server.api.protocol import GenerationBody, PromptOptions
from server.api.sampling import first_given
from server.detokenizer import TextStyle
from server.engine.engine import ModelInfo
from server.errors import BadRequest
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.service import Service


def check_priority(service: Service, body: PromptOptions) -> None:
    """Raise BadRequest for a priority where requests are served in the order of their arrival."""
    if body.priority and service.config.scheduling_policy != "priority":
        raise BadRequest(
            "this server takes requests in the order they come; start it with --scheduling-policy priority, "
            "or leave priority out",
            param="priority",
            code="unsupported_value",
        )


def text_style(body: GenerationBody) -> TextStyle:
    """What of the answer's tokens is shown."""
    return TextStyle(
        stop=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=first_given(body.skip_special_tokens, default=True),
        spaces_between_special=first_given(body.spaces_between_special_tokens, default=True),
    )


def make_plan(
    body: GenerationBody,
    kind: str,
    prompts: Sequence[Prompt],
    *,
    continuing: bool,
    echo: bool = False,
    deadline_s: float | None,
) -> Plan:
    """The plan of a call; `kind` begins its id, the client's `request_id` or a new one ends it."""
    response_id = new_id(kind) if body.request_id is None else f"{kind}-{body.request_id}"
    return Plan(
        response_id=response_id,
        engine_id=response_id if body.request_id is None else new_id(response_id),
        prompts=prompts,
        n=first_given(body.n, default=1),
        style=text_style(body),
        continuing=continuing,
        echo=echo,
        with_token_ids=bool(body.return_token_ids),
        prompt_logprobs=body.prompt_logprobs,
        deadline_s=deadline_s,
        priority=first_given(body.priority, default=0),
        cache_salt=body.cache_salt,
    )


def truncate(ids: list[int], body: PromptOptions, info: ModelInfo, *, max_tokens: int) -> list[int]:
    """The last tokens of a prompt (the first, where `truncation_side` is right), as many as the body wants kept.

    -1 keeps what leaves room for `max_tokens` in the context.
    """
    limit = body.truncate_prompt_tokens
    if limit is None:
        return ids
    if limit == -1:
        limit = max(1, info.max_model_len - max_tokens)
    return ids[:limit] if body.truncation_side == "right" else ids[-limit:]


async def encode_bad_words(tokenizer: Tokenizer, words: Sequence[str] | None) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell the words, at the beginning of a text and after a space."""
    if not words:
        return ()
    return await asyncio.to_thread(_spellings, tokenizer, words)


def _spellings(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)
