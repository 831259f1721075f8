"""POST /v1/responses: a chat in OpenAI's newer form, continued by `previous_response_id` where the earlier one is kept.

It is planned and generated as a chat completion is (`server.api.conversation`); here are its answer, the numbers of its
events and its store. What its output is made of is in `response_output`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.answer import Delta, Plan, TokenEntry
from server.api.body import JSONRoute
from server.api.chat_request import ChatMessage
from server.api.conversation import plan_answers
from server.api.deps import ERRORS, ServiceDep, check_model, json_answer, read_deadline, take_model
from server.api.failures import error_fields
from server.api.generate import TokenCounts, generate
from server.api.logprobs import chat_logprobs
from server.api.plan import check_priority
from server.api.record import current_record
from server.api.response_answer import (
    Deleted,
    IncompleteDetails,
    InputDetails,
    OfferedFunction,
    OutputDetails,
    ResponseObject,
    ResponseUsage,
    Status,
)
from server.api.response_items import unknown_output
from server.api.response_output import Event, ResponseOutput
from server.api.response_request import ResponseRequest
from server.api.response_store import ResponseStore, StoredResponse
from server.api.responses import ChatTokenLogprob
from server.api.sampling import first_given
from server.api.sse import EventStream, named_event, until_disconnect
from server.api.tool_use import ToolUse
from server.engine.engine import Engine
from server.errors import BadRequest, ServeError
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
    if (place := unknown_output(body.input, earlier)) is not None:
        param = f"input[{place}].call_id"
        raise BadRequest(f"{param} names no call of this conversation", param=param)
    try:
        plan, use = await plan_answers(
            body.to_chat(earlier),
            "resp",
            service,
            deadline_s=deadline_s,
            prompt_param="input",
            length_param="max_output_tokens",
        )
    except BadRequest as error:
        error.param = _renamed(error.param)
        raise
    plan = replace(plan, response_id=plan.response_id.replace("-", "_", 1))
    call = _Call(body, [*earlier, *body.messages], plan, use, service, engine, tokenizer, store)
    if body.stream:
        return EventStream(call.stream(), call.error_event)
    return json_answer(await until_disconnect(request.receive, call.collect()))


def _renamed(param: str | None) -> str | None:
    """A field of a chat as it is called here. A call whose arguments are cut can only be of an earlier response."""
    field = (param or "").partition(".")[0]
    names = {"messages": "input", "response_format": "text.format"}  # the first: what the template does not accept
    return "previous_response_id" if field.startswith("messages[") else names.get(field, param)


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
        use: ToolUse | None,
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
        self._num_events = 0  # written
        self._output = ResponseOutput(use, self._logprobs)
        self._keeps = first_given(body.store, default=True) and store.max_bytes > 0

    async def collect(self) -> ResponseObject:
        """The whole response."""
        self._output.begin()
        last = Delta(0)
        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                for last in batch:
                    self._output.feed(last)
        status = _status(last)
        self._output.end(status)
        return self._finish(status)

    async def stream(self) -> AsyncGenerator[bytes]:
        """OpenAI's events, numbered; no [DONE], as there."""
        written = self._written
        last, started = Delta(0), False
        async with aclosing(self._deltas) as deltas:
            async for batch in deltas:
                data = b""
                if not started:  # only now: a request that fails before its first token gets an error's status
                    started = True
                    begun = {"response": self._response("in_progress")}
                    data += written(("response.created", begun), ("response.in_progress", begun))
                    data += written(*self._output.begin())
                for last in batch:
                    data += written(*self._output.feed(last))
                if data:
                    yield data
        status = _status(last)
        ended = written(*self._output.end(status))
        yield ended + written((f"response.{status}", {"response": self._finish(status)}))

    def _finish(self, status: Status) -> ResponseObject:
        response = self._response(status)
        if self._keeps:
            messages = (*self._messages, self._output.to_message())
            stored = StoredResponse(response.to_json(), messages, current_record().key)
            self._store.put(self._plan.response_id, stored)
        return response

    def _logprobs(self, entries: Sequence[TokenEntry]) -> list[ChatTokenLogprob]:
        return chat_logprobs(entries, self._tokenizer).content if self._body.include else []

    def error_event(self, error: ServeError) -> bytes:
        """OpenAI's, with the error as other streams have it: its client raises that, and shows the other."""
        body = error_fields(error)
        fields = {name: body["error"][name] for name in ("code", "message", "param")}
        return self._written(("error", {**fields, **body}))

    def _written(self, *events: Event) -> bytes:
        data = b""
        for kind, fields in events:
            data += named_event(kind, {"sequence_number": self._num_events, **fields})
            self._num_events += 1
        return data

    def _response(self, status: Status) -> ResponseObject:
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
            output=self._output.items,
            parallel_tool_calls=first_given(body.parallel_tool_calls, default=True),
            previous_response_id=body.previous_response_id,
            store=self._keeps,
            temperature=params.temperature,
            text=body.text_options,
            tool_choice=body.tool_choice_said,
            tools=[
                OfferedFunction(
                    name=tool.name,
                    description=tool.description,
                    parameters=tool.parameters,
                    strict=bool(tool.strict),
                )
                for tool in body.tools or ()
            ],
            top_logprobs=first_given(body.top_logprobs, default=0),
            top_p=params.top_p,
            usage=None if status == "in_progress" else usage,
        )


def _status(last: Delta) -> Status:
    return "incomplete" if last.finish_reason == "length" else "completed"
