"""POST /v1/chat/completions: answer a conversation, rendered by the model's chat template."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
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
    read_deadline,
    usage_of,
    usage_wanted,
)
from server.api.generate import TokenCounts, generate
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.plan import check_priority, encode_bad_words, make_plan, truncate
from server.api.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
)
from server.api.sampling import build_params, check_prompt, first_given, resolve_max_tokens
from server.api.sse import DONE, EventStream, event, until_disconnect
from server.engine.engine import Engine
from server.errors import BadRequest
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
    check_num_sequences(service, n=first_given(body.n, default=1), num_prompts=1)
    check_priority(service, body)
    check_template(service, body)
    prompt = await prepare(body, engine, tokenizer)
    plan = make_plan(body, "chatcmpl", [prompt], continuing=bool(body.continue_final_message), deadline_s=deadline_s)
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
    chat_template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation; the newer name `developer` is `system` to chat templates. Raises BadRequest.

    `chat_template` replaces the model's; `variables` are what a template may use beside the messages.
    """
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
        chat_template=chat_template,
        variables=variables or {},
    )


def check_template(service: Service, body: ChatCompletionRequest) -> None:
    """Raise BadRequest for a template of the request's own where the operator has not allowed them."""
    if body.chat_template is not None and not service.config.trust_request_chat_template:
        raise BadRequest(
            "this server does not run templates of requests; start it with --trust-request-chat-template, or leave "
            "chat_template out",
            param="chat_template",
            code="unsupported_value",
        )


async def prepare(
    body: ChatCompletionRequest,
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    prompt_param: str = "messages",
    length_param: str | None = None,
) -> Prompt:
    """The rendered conversation with its parameters. The params are what errors call them. Raises BadRequest."""
    if length_param is None:
        length_param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    ids = await render(
        tokenizer,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        variables=body.template_variables,
    )
    check_prompt(ids, engine.info, param=prompt_param)
    asked = first_given(body.max_completion_tokens, body.max_tokens, default=None)
    ids = truncate(ids, body, engine.info, max_tokens=first_given(asked, default=1))
    max_tokens = resolve_max_tokens(
        asked,
        default=None,
        num_prompt_tokens=len(ids),
        info=engine.info,
        param=length_param,
        prompt_param=prompt_param,
    )
    logprobs = first_given(body.top_logprobs, default=0) if body.logprobs else None
    params = build_params(
        body,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        bad_words=await encode_bad_words(tokenizer, body.bad_words),
        defaults=tokenizer.sampling_defaults,
        info=engine.info,
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
        answer = ChatCompletion(
            id=self._plan.response_id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=[self._whole(whole) for whole in wholes],
            usage=usage_of(self._counts),
        )
        if self._body.return_token_ids:
            answer.prompt_token_ids = self._plan.prompts[0].ids
        if wholes[0].prompt_scores is not None:
            answer.prompt_logprobs = prompt_logprobs(wholes[0].prompt_scores, self._tokenizer)
        return answer

    async def stream(self) -> AsyncGenerator[bytes]:
        """Per answer a role chunk, content chunks and a finish chunk; the usage if asked for; [DONE]."""
        with_usage, running = usage_wanted(self._body)
        introduced: set[int] = set()

        def extra() -> dict[str, Any]:
            return {"usage": usage_of(self._counts) if running else None} if with_usage else {}

        def chunk(part: Delta) -> bytes:
            piece = ChatDelta() if part.finish_reason is not None else ChatDelta(content=part.text)
            return self._chunk([self._choice(part, piece)], **extra())

        texts = TextChunks(lambda index, text: chunk(Delta(index, text)))

        def events(delta: Delta) -> bytes:
            start = b""
            if delta.index not in introduced:
                ids = self._plan.prompts[0].ids if self._body.return_token_ids and not introduced else None
                first = {} if ids is None else {"prompt_token_ids": ids}
                introduced.add(delta.index)
                role = ChatDelta(role="assistant", content="")
                start = event(self._chunk([self._choice(Delta(delta.index), role)], **extra(), **first))
            if delta.finish_reason is None and not (delta.entries or delta.token_ids or running):
                return start + texts.event(delta.index, delta.text)
            return start + b"".join(event(chunk(part)) for part in delta.split())

        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                yield b"".join(map(events, batch))
        usage = event(self._chunk([], usage=usage_of(self._counts))) if with_usage else b""
        yield usage + DONE

    def _chunk(self, choices: list[ChatChunkChoice], **extra: Any) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._plan.response_id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            choices=choices,
            **extra,
        )
        return chunk.to_json()

    def _whole(self, delta: Delta) -> ChatChoice:
        assert delta.finish_reason is not None, "generate ends every answer or raises"
        choice = ChatChoice(
            index=delta.index,
            message=ChatAnswer(role="assistant", content=delta.text, refusal=None),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = delta.token_ids
        return choice

    def _choice(self, delta: Delta, piece: ChatDelta) -> ChatChunkChoice:
        choice = ChatChunkChoice(
            index=delta.index,
            delta=piece,
            logprobs=self._logprobs(delta) if delta.entries else None,
            finish_reason=delta.finish_reason,
        )
        if delta.finish_reason is not None:
            choice.stop_reason = delta.stop_reason
        if self._body.return_token_ids:
            choice.token_ids = delta.token_ids
        return choice

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return chat_logprobs(delta.entries, self._tokenizer, as_ids=as_ids)
