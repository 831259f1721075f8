"""POST /v1/responses: a chat in OpenAI's newer form, continued by `previous_response_id` where the earlier one is kept.

It is rendered and generated as a chat completion is (`server.api.chat`); here are its answer, its events and its store.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic_core import to_json
from starlette.responses import Response

from server.api.answer import Delta, Plan
from server.api.body import JSONRoute
from server.api.chat_request import ChatMessage
from server.api.conversation import prepare
from server.api.deps import ERRORS, ServiceDep, check_model, json_answer, new_id, read_deadline, take_model
from server.api.generate import TokenCounts, generate
from server.api.logprobs import chat_logprobs
from server.api.plan import check_priority, make_plan
from server.api.record import current_record
from server.api.response_answer import (
    Deleted,
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    OutputMessage,
    OutputText,
    ResponseObject,
    ResponseUsage,
    Status,
)
from server.api.response_request import ResponseRequest
from server.api.response_store import ResponseStore, StoredResponse
from server.api.responses import ChatTokenLogprob
from server.api.sampling import first_given
from server.api.sse import EventStream, until_disconnect
from server.api.structured import compile_constraint
from server.api.tools import tool_format
from server.engine.engine import Engine
from server.errors import BadRequest
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.service import Service

router = APIRouter(route_class=JSONRoute)


async def _store(request: Request) -> ResponseStore:  # async, or FastAPI would call it in a thread
    store: ResponseStore = request.app.state.responses
    return store


StoreDep = Annotated[ResponseStore, Depends(_store)]


@router.post("/v1/responses", response_model=ResponseObject, responses=ERRORS)
async def create_response(body: ResponseRequest, request: Request, service: ServiceDep, store: StoreDep) -> Response:
    """Answer a text or a conversation; the answer is kept unless store is false."""
    check_model(service, body.model)
    deadline_s = read_deadline(request, service)
    check_priority(service, body)
    engine, tokenizer = await take_model(request, service, deadline_s)
    if body.store and not store.max_bytes:
        raise BadRequest("this server keeps no responses; leave store out", param="store", code="unsupported_value")
    earlier: list[ChatMessage] = []
    if body.previous_response_id is not None:
        key = current_record().key
        earlier += store.get(body.previous_response_id, key, param="previous_response_id").messages
    chat = body.to_chat(earlier)
    form = tool_format(service, tokenizer)
    try:
        grammar = await compile_constraint(chat, service)
        prompt = await prepare(chat, engine, tokenizer, form, prompt_param="input", length_param="max_output_tokens")
    except BadRequest as error:
        renamed = {"messages": "input", "response_format": "text.format"}  # what the template does not accept
        error.param = renamed.get((error.param or "").partition(".")[0], error.param)
        raise
    plan = make_plan(chat, "resp", [prompt], continuing=False, deadline_s=deadline_s, grammar=grammar)
    plan = replace(plan, response_id=plan.response_id.replace("-", "_", 1))
    call = _Call(body, [*earlier, *body.messages], plan, service, engine, tokenizer, store)
    if body.stream:
        return EventStream(call.stream())
    return json_answer(await until_disconnect(request.receive, call.collect()))


@router.get("/v1/responses/{response_id}", response_model=ResponseObject, responses=ERRORS)
async def retrieve_response(response_id: str, store: StoreDep) -> Response:
    """A response that is kept."""
    return Response(store.get(response_id, current_record().key).body, media_type="application/json")


@router.delete("/v1/responses/{response_id}", response_model=Deleted, responses=ERRORS)
async def delete_response(response_id: str, store: StoreDep) -> Response:
    """Forget a response."""
    store.delete(response_id, current_record().key)
    return json_answer(Deleted(id=response_id, object="response", deleted=True))


class _Call:
    """One validated request on its way to a response."""

    def __init__(
        self,
        body: ResponseRequest,
        messages: list[ChatMessage],
        plan: Plan,
        service: Service,
        engine: Engine,
        tokenizer: Tokenizer,
        store: ResponseStore,
    ) -> None:
        self._body = body
        self._messages = messages
        self._plan = plan
        self._tokenizer = tokenizer
        self._store = store
        self._counts = TokenCounts()
        self._deltas = generate(plan, engine, tokenizer, service.metrics, self._counts)
        self._created = int(time.time())
        self._message_id = new_id("msg").replace("-", "_", 1)
        self._keeps = first_given(body.store, default=True) and store.max_bytes > 0

    async def collect(self) -> ResponseObject:
        """The whole response."""
        whole = Delta(0)
        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                for delta in batch:
                    whole.extend(delta)
        return self._finish(whole)

    async def stream(self) -> AsyncGenerator[bytes]:
        """OpenAI's events of a response with one message with one part, numbered; no [DONE], as there."""
        number = 0

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            payload = to_json({"type": kind, "sequence_number": number, **fields})
            number += 1
            return f"event: {kind}\n".encode() + b"data: " + payload + b"\n\n"

        place = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        whole, empty = Delta(0), OutputText(text="")
        async with aclosing(self._deltas) as deltas:
            started = False
            async for batch in deltas:
                events = b""
                if not started:  # only now: a request that fails before its first token gets an error's status
                    started = True
                    response = self._response([], "in_progress")
                    events += event("response.created", response=response)
                    events += event("response.in_progress", response=response)
                    item = self._message([], "in_progress")
                    events += event("response.output_item.added", output_index=0, item=item)
                    events += event("response.content_part.added", part=empty, **place)
                for delta in batch:
                    whole.extend(delta)
                    if delta.text:
                        logprobs = self._logprobs(delta)
                        events += event("response.output_text.delta", delta=delta.text, logprobs=logprobs, **place)
                yield events
        response = self._finish(whole)
        [item] = response.output
        [part] = item.content
        yield b"".join(
            (
                event("response.output_text.done", text=part.text, logprobs=part.logprobs, **place),
                event("response.content_part.done", part=part, **place),
                event("response.output_item.done", output_index=0, item=item),
                event(f"response.{response.status}", response=response),
            )
        )

    def _finish(self, whole: Delta) -> ResponseObject:
        status: Status = "incomplete" if whole.finish_reason == "length" else "completed"
        part = OutputText(text=whole.text, logprobs=self._logprobs(whole))
        response = self._response([self._message([part], status)], status)
        if self._keeps:
            said = ChatMessage(role="assistant", content=whole.text)
            stored = StoredResponse(response.to_json(), (*self._messages, said), current_record().key)
            self._store.put(self._plan.response_id, stored)
        return response

    def _message(self, content: list[OutputText], status: Status) -> OutputMessage:
        return OutputMessage(id=self._message_id, status=status, content=content)

    def _logprobs(self, delta: Delta) -> list[ChatTokenLogprob]:
        return chat_logprobs(delta.entries, self._tokenizer).content if self._body.include else []

    def _response(self, output: list[OutputMessage], status: Status) -> ResponseObject:
        body, counts, params = self._body, self._counts, self._plan.prompts[0].params
        usage = ResponseUsage(
            input_tokens=counts.prompt,
            input_tokens_details=InputDetails(cached_tokens=counts.cached),
            output_tokens=counts.completion,
            output_tokens_details=OutputDetails(),
            total_tokens=counts.prompt + counts.completion,
        )
        return ResponseObject(
            id=self._plan.response_id,
            created_at=self._created,
            status=status,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=body.model,
            output=output,
            previous_response_id=body.previous_response_id,
            store=self._keeps,
            temperature=params.temperature,
            text=body.text_options,
            top_logprobs=first_given(body.top_logprobs, default=0),
            top_p=params.top_p,
            usage=None if status == "in_progress" else usage,
        )
