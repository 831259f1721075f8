"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's form, for programs that speak no other.

It is a chat, asked and answered otherwise: `message_request` has what is asked, `message_answer` the answer. Errors are
OpenAI's body, which Anthropic's clients read too: they go by the status, and show `error.message`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.answer import Delta, Plan
from server.api.body import JSONRoute
from server.api.conversation import plan_answers, render
from server.api.deps import ERRORS, ServiceDep, check_model, json_answer, read_deadline, take_model
from server.api.failures import error_fields
from server.api.generate import TokenCounts, generate
from server.api.message_answer import Blocks, CountAnswer, Event, MessageAnswer, MessageUsage, StopReason
from server.api.message_request import CountRequest, MessageRequest
from server.api.plan import check_priority
from server.api.sse import EventStream, named_event, until_disconnect
from server.api.tool_use import ToolUse, tool_format
from server.engine.engine import Engine
from server.errors import ServeError
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.service import Service

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/messages", response_model=MessageAnswer, responses=ERRORS)
async def create_message(body: MessageRequest, request: Request, service: ServiceDep) -> Response:
    """Answer the conversation."""
    check_model(service, body.model)
    deadline_s = read_deadline(request, service)
    check_priority(service, body)
    engine, tokenizer = await take_model(request, service, deadline_s)
    plan, use = await plan_answers(body.to_chat(), "msg", service, deadline_s=deadline_s)
    plan = replace(plan, response_id=plan.response_id.replace("-", "_", 1))
    call = _Call(body, plan, use, service, engine, tokenizer)
    if body.stream:
        return EventStream(call.stream(), _error_event)
    return json_answer(await until_disconnect(request.receive, call.collect()))


@router.post("/v1/messages/count_tokens", response_model=CountAnswer, responses=ERRORS)
async def count_tokens(body: CountRequest, service: ServiceDep) -> Response:
    """Tokens of the rendered conversation, tools included."""
    check_model(service, body.model)
    _, tokenizer = service.facts()
    chat = body.to_chat()
    ids = await render(
        tokenizer,
        chat.messages,
        tool_format(service, tokenizer),
        tools=None if chat.tool_choice == "none" else chat.tools,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
    )
    return json_answer(CountAnswer(input_tokens=len(ids)))


class _Call:
    """One validated request on its way to an answer."""

    def __init__(
        self,
        body: MessageRequest,
        plan: Plan,
        use: ToolUse | None,
        service: Service,
        engine: Engine,
        tokenizer: Tokenizer,
    ) -> None:
        self._body = body
        self._plan = plan
        self._blocks = Blocks(use)
        self._counts = TokenCounts()
        self._deltas = generate(plan, engine, tokenizer, service.metrics, self._counts)

    async def collect(self) -> MessageAnswer:
        """The whole answer."""
        last = Delta(0)
        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                for last in batch:
                    self._blocks.feed(last.text)
        self._blocks.end()
        return self._answer(*self._blocks.stop(last))

    async def stream(self) -> AsyncGenerator[bytes]:
        """Anthropic's events; the first comes with the first token, so that a failure before has its status."""
        last, started = Delta(0), False
        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                data = b"" if started else _written([("message_start", {"message": self._answer(None, None)})])
                started = True
                for last in batch:
                    data += _written(self._blocks.feed(last.text))
                if data:
                    yield data
        events = self._blocks.end()
        reason, sequence = self._blocks.stop(last)
        ended = {"stop_reason": reason, "stop_sequence": sequence}
        yield _written([*events, ("message_delta", {"delta": ended, "usage": self._usage()}), ("message_stop", {})])

    def _answer(self, reason: StopReason | None, sequence: str | None) -> MessageAnswer:
        return MessageAnswer(
            id=self._plan.response_id,
            model=self._body.model,
            content=self._blocks.content,
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(),
        )

    def _usage(self) -> MessageUsage:
        counts = self._counts
        return MessageUsage(
            input_tokens=counts.prompt - counts.cached,
            cache_read_input_tokens=counts.cached,
            output_tokens=counts.completion,
        )


def _error_event(error: ServeError) -> bytes:
    return named_event("error", error_fields(error))


def _written(events: list[Event]) -> bytes:
    return b"".join(named_event(kind, fields) for kind, fields in events)
