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
    new_id,
    read_deadline,
    usage_of,
)
from server.api.generate import TokenCounts, generate
from server.api.logprobs import completion_logprobs
from server.api.responses import Completion, CompletionChoice, Usage
from server.api.sampling import DEFAULT_COMPLETION_TOKENS, build_params, check_prompt, first_given, resolve_max_tokens
from server.api.sse import DONE, EventStream, event, until_disconnect
from server.api.structured import compile_constraint
from server.core import Grammar
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
    engine, tokenizer = service.ready()
    n = first_given(body.n, default=1)
    check_num_sequences(service, n=n, num_prompts=len(body.prompt))
    grammar = await compile_constraint(body, service)
    plan = Plan(
        response_id=new_id("cmpl"),
        prompts=[await _prepare(body, prompt, engine, tokenizer, grammar) for prompt in body.prompt],
        n=n,
        stop=body.stop,
        continuing=True,
        echo=bool(body.echo),
        deadline_s=deadline_s,
    )
    call = _Call(body, plan, service, engine, tokenizer)
    if body.stream:
        return EventStream(call.stream())
    return json_answer(await until_disconnect(request.receive, call.collect()))


async def _prepare(
    body: CompletionRequest, prompt: str | list[int], engine: Engine, tokenizer: Tokenizer, grammar: Grammar | None
) -> Prompt:
    if isinstance(prompt, str):
        with_bos = first_given(body.add_special_tokens, default=True)
        ids = await encode(tokenizer, prompt, add_special_tokens=with_bos)
    else:
        ids = prompt
    check_prompt(ids, engine.info, param="prompt")
    max_tokens = resolve_max_tokens(
        body.max_tokens,
        default=DEFAULT_COMPLETION_TOKENS,
        num_prompt_tokens=len(ids),
        info=engine.info,
        param="max_tokens",
        prompt_param="prompt",
    )
    params = build_params(
        body,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        defaults=tokenizer.sampling_defaults,
        info=engine.info,
        grammar=grammar,
    )
    text = "" if not body.echo else prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    return Prompt(ids, params, text)


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
        return self._wrap([self._choice(whole) for whole in wholes], usage=usage_of(self._counts))

    async def stream(self) -> AsyncGenerator[bytes]:
        """Text chunks, a finish chunk per answer, the usage if asked for, [DONE]."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        extra: dict[str, Usage | None] = {"usage": None} if with_usage else {}
        texts = TextChunks(lambda index, text: self._wrap([self._choice(Delta(index, text))], **extra).to_json())

        def events(delta: Delta) -> bytes:
            if delta.finish_reason is None and not delta.entries:
                return texts.event(delta.index, delta.text)
            return b"".join(event(self._wrap([self._choice(part)], **extra).to_json()) for part in delta.split())

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
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=completion_logprobs(delta.entries, self._tokenizer) if wanted else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
