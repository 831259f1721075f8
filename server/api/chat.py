"""POST /v1/chat/completions: answer a conversation, rendered by the model's chat template."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answer import Delta, Plan, Prompt
from server.api.body import JSONRoute
from server.api.chat_request import ChatCompletionRequest, ChatMessage
from server.api.chunks import TextChunks
from server.api.deps import (
    ERRORS,
    ServiceDep,
    check_model,
    check_num_sequences,
    json_answer,
    new_id,
    read_deadline,
    usage_of,
)
from server.api.generate import TokenCounts, generate
from server.api.logprobs import chat_logprobs
from server.api.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from server.api.sampling import build_params, check_prompt, first_given, resolve_max_tokens
from server.api.sse import DONE, EventStream, event, until_disconnect
from server.api.structured import compile_constraint
from server.core import Grammar
from server.engine.engine import Engine
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.service import Service

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def create_chat_completion(body: ChatCompletionRequest, request: Request, service: ServiceDep) -> Response:
    """Answer the conversation n times."""
    check_model(service, body.model)
    deadline_s = read_deadline(request, service)
    engine, tokenizer = service.ready()
    n = first_given(body.n, default=1)
    check_num_sequences(service, n=n, num_prompts=1)
    grammar = await compile_constraint(body, service)
    plan = Plan(
        response_id=new_id("chatcmpl"),
        prompts=[await _prepare(body, engine, tokenizer, grammar)],
        n=n,
        stop=body.stop,
        continuing=bool(body.continue_final_message) or grammar is not None,  # matched text keeps a leading space
        deadline_s=deadline_s,
    )
    call = _Call(body, plan, service, engine, tokenizer)
    if body.stream:
        return EventStream(call.stream())
    return json_answer(await until_disconnect(request.receive, call.collect()))


async def render(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
) -> list[int]:
    """Ids of a conversation; the newer name `developer` is `system` to chat templates. Raises BadRequest."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        plain.append({"role": role, "content": message.content, **({"name": message.name} if message.name else {})})
    continued = bool(continue_final_message)
    return await asyncio.to_thread(
        tokenizer.render_chat,
        plain,
        add_generation_prompt=first_given(add_generation_prompt, default=not continued),
        continue_final_message=continued,
    )


async def _prepare(
    body: ChatCompletionRequest, engine: Engine, tokenizer: Tokenizer, grammar: Grammar | None
) -> Prompt:
    ids = await render(
        tokenizer,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
    )
    check_prompt(ids, engine.info, param="messages")
    max_tokens = resolve_max_tokens(
        first_given(body.max_completion_tokens, body.max_tokens, default=None),
        default=None,
        num_prompt_tokens=len(ids),
        info=engine.info,
        param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        prompt_param="messages",
    )
    logprobs = first_given(body.top_logprobs, default=0) if body.logprobs else None
    params = build_params(
        body,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=None,
        defaults=tokenizer.sampling_defaults,
        info=engine.info,
        grammar=grammar,
    )
    return Prompt(ids, params)


class _Call:
    """One validated request on its way to an answer."""

    def __init__(
        self, body: ChatCompletionRequest, plan: Plan, service: Service, engine: Engine, tokenizer: Tokenizer
    ) -> None:
        self._body = body
        self._plan = plan
        self._tokenizer = tokenizer
        self._counts = TokenCounts()
        self._deltas = generate(plan, engine, tokenizer, service.metrics, self._counts)
        self._created = int(time.time())

    async def collect(self) -> ChatCompletion:
        """The whole answer."""
        wholes = [Delta(i) for i in range(self._plan.n)]
        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                for delta in batch:
                    wholes[delta.index].extend(delta)
        return ChatCompletion(
            id=self._plan.response_id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=[self._whole(whole) for whole in wholes],
            usage=usage_of(self._counts),
        )

    async def stream(self) -> AsyncGenerator[bytes]:
        """Per answer a role chunk, content chunks and a finish chunk; the usage if asked for; [DONE]."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        extra: dict[str, Usage | None] = {"usage": None} if with_usage else {}
        introduced: set[int] = set()

        def chunk(part: Delta) -> bytes:
            piece = ChatDelta() if part.finish_reason is not None else ChatDelta(content=part.text)
            return self._chunk([self._choice(part, piece)], **extra)

        texts = TextChunks(lambda index, text: chunk(Delta(index, text)))

        def events(delta: Delta) -> bytes:
            start = b""
            if delta.index not in introduced:
                introduced.add(delta.index)
                role = ChatDelta(role="assistant", content="")
                start = event(self._chunk([self._choice(Delta(delta.index), role)], **extra))
            if delta.finish_reason is None and not delta.entries:
                return start + texts.event(delta.index, delta.text)
            return start + b"".join(event(chunk(part)) for part in delta.split())

        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                yield b"".join(map(events, batch))
        usage = event(self._chunk([], usage=usage_of(self._counts))) if with_usage else b""
        yield usage + DONE

    def _chunk(self, choices: list[ChatChunkChoice], **usage: Usage | None) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._plan.response_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            choices=choices,
            **usage,
        )
        return chunk.to_json()

    def _whole(self, delta: Delta) -> ChatChoice:
        assert delta.finish_reason is not None, "generate ends every answer or raises"
        return ChatChoice(
            index=delta.index,
            message=ChatAnswer(role="assistant", content=delta.text, refusal=None),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    def _choice(self, delta: Delta, piece: ChatDelta) -> ChatChunkChoice:
        choice = ChatChunkChoice(
            index=delta.index,
            delta=piece,
            logprobs=self._logprobs(delta) if delta.entries else None,
            finish_reason=delta.finish_reason,
        )
        if delta.finish_reason is not None:
            choice.stop_reason = delta.stop_reason
        return choice

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return chat_logprobs(delta.entries, self._tokenizer) if self._body.logprobs else None
