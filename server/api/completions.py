"""POST /v1/completions: continue prompts given as text or as token ids, any number of them in one call."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answer import Delta, Plan, Prompt
from server.api.body import JSONRoute
from server.api.chunks import TextChunks
from server.api.completion_request import CompletionRequest
from server.api.deps import (
    ERRORS,
    ServiceDep,
    check_model,
    check_num_sequences,
    encode,
    json_answer,
    read_deadline,
    take_model,
    usage_of,
    usage_wanted,
)
from server.api.generate import TokenCounts, generate
from server.api.logprobs import completion_logprobs, prompt_logprobs
from server.api.plan import check_priority, encode_bad_words, make_plan, truncate
from server.api.responses import Completion, CompletionChoice, Usage
from server.api.sampling import DEFAULT_COMPLETION_TOKENS, build_params, check_prompt, first_given, resolve_max_tokens
from server.api.sse import DONE, EventStream, event, until_disconnect
from server.api.structured import compile_constraint
from server.engine.engine import Engine
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.service import Service

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/completions", response_model=Completion, responses=ERRORS)
async def create_completion(body: CompletionRequest, request: Request, service: ServiceDep) -> Response:
    """Continue each prompt n times."""
    check_model(service, body.model)
    deadline_s = read_deadline(request, service)
    check_num_sequences(service, n=first_given(body.n, default=1), num_prompts=len(body.prompt))
    check_priority(service, body)
    engine, tokenizer = await take_model(request, service, deadline_s)
    bad_words = await encode_bad_words(tokenizer, body.bad_words)
    prompts = [await _prepare(body, prompt, engine, tokenizer, bad_words) for prompt in body.prompt]
    grammar = await compile_constraint(body, service)
    plan = make_plan(
        body, "cmpl", prompts, continuing=True, echo=bool(body.echo), deadline_s=deadline_s, grammar=grammar
    )
    call = _Call(body, plan, service, engine, tokenizer)
    if body.stream:
        return EventStream(call.stream())
    return json_answer(await until_disconnect(request.receive, call.collect()))


async def _prepare(
    body: CompletionRequest,
    prompt: str | list[int],
    engine: Engine,
    tokenizer: Tokenizer,
    bad_words: tuple[tuple[int, ...], ...],
) -> Prompt:
    if isinstance(prompt, str):
        with_bos = first_given(body.add_special_tokens, default=True)
        ids = await encode(tokenizer, prompt, add_special_tokens=with_bos)
    else:
        ids = prompt
    check_prompt(ids, engine.info, param="prompt")
    asked = first_given(body.max_tokens, default=DEFAULT_COMPLETION_TOKENS)
    kept = truncate(ids, body, engine.info, max_tokens=asked)
    max_tokens = resolve_max_tokens(
        body.max_tokens,
        default=DEFAULT_COMPLETION_TOKENS,
        num_prompt_tokens=len(kept),
        info=engine.info,
        param="max_tokens",
        prompt_param="prompt",
    )
    echo_logprobs = body.logprobs if body.echo else None
    scored = [k for k in (echo_logprobs, body.prompt_logprobs) if k is not None]
    params = build_params(
        body,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=max(scored, default=None),
        bad_words=bad_words,
        defaults=tokenizer.sampling_defaults,
        info=engine.info,
    )
    text = ""
    if body.echo:
        whole = isinstance(prompt, str) and len(kept) == len(ids)
        skip = first_given(body.skip_special_tokens, default=True)
        text = str(prompt) if whole else tokenizer.decode(kept, skip_special_tokens=skip)
    return Prompt(kept, params, text, echo_logprobs)


class _Call:
    """One validated request on its way to an answer."""

    def __init__(
        self, body: CompletionRequest, plan: Plan, service: Service, engine: Engine, tokenizer: Tokenizer
    ) -> None:
        self._body = body
        self._plan = plan
        self._tokenizer = tokenizer
        self._counts = TokenCounts()
        self._deltas = generate(plan, engine, tokenizer, service.metrics, self._counts)
        self._created = int(time.time())

    async def collect(self) -> Completion:
        """The whole answer."""
        wholes = [Delta(i) for i in range(len(self._plan.prompts) * self._plan.n)]
        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                for delta in batch:
                    wholes[delta.index].extend(delta)
        choices = [self._choice(whole) for whole in wholes]
        for choice, whole in zip(choices, wholes, strict=True):
            if self._body.return_token_ids:
                choice.prompt_token_ids = self._plan.prompt_of(whole.index).ids
            if whole.prompt_scores is not None:
                choice.prompt_logprobs = prompt_logprobs(whole.prompt_scores, self._tokenizer)
        return self._wrap(choices, usage=usage_of(self._counts))

    async def stream(self) -> AsyncGenerator[bytes]:
        """Text chunks, a finish chunk per answer, the usage if asked for, [DONE]."""
        with_usage, running = usage_wanted(self._body)
        started: set[int] = set()

        def chunk(part: Delta) -> bytes:
            usage = {"usage": usage_of(self._counts) if running else None} if with_usage else {}
            choice = self._choice(part)
            if self._body.return_token_ids and part.index not in started:
                started.add(part.index)
                choice.prompt_token_ids = self._plan.prompt_of(part.index).ids
            return self._wrap([choice], **usage).to_json()

        texts = TextChunks(lambda index, text: chunk(Delta(index, text)))

        def events(delta: Delta) -> bytes:
            if delta.finish_reason is None and not (delta.entries or delta.token_ids or running):
                return texts.event(delta.index, delta.text)
            return b"".join(event(chunk(part)) for part in delta.split())

        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                yield b"".join(map(events, batch))
        usage = event(self._wrap([], usage=usage_of(self._counts)).to_json()) if with_usage else b""
        yield usage + DONE

    def _wrap(self, choices: list[CompletionChoice], **usage: Usage | None) -> Completion:
        return Completion(
            id=self._plan.response_id,
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=choices,
            **usage,
        )

    def _choice(self, delta: Delta) -> CompletionChoice:
        wanted = self._body.logprobs is not None and (delta.entries or not self._body.stream)
        as_ids = bool(self._body.return_tokens_as_token_ids)
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=completion_logprobs(delta.entries, self._tokenizer, as_ids=as_ids) if wanted else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = delta.token_ids
        return choice
