"""POST /v1/chat/completions: answer a conversation, rendered by the model's chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answer import Delta, Plan
from server.api.body import JSONRoute
from server.api.chat_request import ChatCompletionRequest
from server.api.chunks import TextChunks
from server.api.conversation import check_template, plan_answers
from server.api.deps import (
    ERRORS,
    ServiceDep,
    check_model,
    check_num_sequences,
    json_answer,
    read_deadline,
    take_model,
    usage_of,
    usage_wanted,
)
from server.api.generate import TokenCounts, generate
from server.api.logprobs import chat_logprobs, prompt_logprobs
from server.api.plan import check_priority
from server.api.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    FinishReason,
)
from server.api.sampling import first_given
from server.api.sse import DONE, EventStream, event, until_disconnect
from server.api.tool_answers import ToolAnswer
from server.api.tool_use import ToolUse
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
    check_num_sequences(service, n=first_given(body.n, default=1), num_prompts=1)
    check_priority(service, body)
    check_template(service, body)
    engine, tokenizer = await take_model(request, service, deadline_s)
    plan, use = await plan_answers(body, "chatcmpl", service, deadline_s=deadline_s)
    call = _Call(body, plan, use, service, engine, tokenizer)
    if body.stream:
        return EventStream(call.stream())
    return json_answer(await until_disconnect(request.receive, call.collect()))


class _Call:
    """One validated request on its way to an answer."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        plan: Plan,
        use: ToolUse | None,
        service: Service,
        engine: Engine,
        tokenizer: Tokenizer,
    ) -> None:
        self._body = body
        self._plan = plan
        self._calling = [] if use is None else [ToolAnswer(use) for _ in range(plan.n)]
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
            if self._calling:
                return start + b"".join(event(self._chunk([choice], **extra())) for choice in self._pieces(delta))
            if delta.finish_reason is None and not (delta.entries or delta.token_ids or running):
                return start + texts.event(delta.index, delta.text)
            return start + b"".join(event(chunk(part)) for part in delta.split())

        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                yield b"".join(map(events, batch))
        usage = event(self._chunk([], usage=usage_of(self._counts))) if with_usage else b""
        yield usage + DONE

    def _pieces(self, delta: Delta) -> list[ChatChunkChoice]:
        """The chunks of a delta where calls are looked for. What comes with the text comes with the first of them."""
        calling = self._calling[delta.index]
        choices: list[ChatChunkChoice] = []
        for part in delta.split():
            pieces = calling.deltas(part.text)
            if part.finish_reason is not None:
                part.finish_reason = calling.finish(part.finish_reason)
                pieces += calling.last_deltas()
            said = [self._choice(Delta(delta.index), piece) for piece in pieces]
            if part.finish_reason is not None or (not said and (part.entries or part.token_ids)):
                said.append(self._choice(part, ChatDelta()))
            elif said:
                said[0] = self._choice(part, pieces[0])
            choices += said
        return choices

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
        reason: FinishReason = delta.finish_reason
        message = ChatAnswer(role="assistant", content=delta.text, refusal=None)
        if self._calling:
            message = self._calling[delta.index].message(delta.text)
            reason = self._calling[delta.index].finish(reason)
        choice = ChatChoice(
            index=delta.index,
            message=message,
            logprobs=self._logprobs(delta),
            finish_reason=reason,
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
