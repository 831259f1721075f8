"""What handlers share: the service behind the app, the served names, the deadline, and a JSON answer."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request
from starlette.responses import Response

from server.api.generate import TokenCounts
from server.api.presence import VISIT
from server.api.protocol import GenerationBody
from server.api.record import Phases, current_record
from server.api.responses import Answer, ErrorAnswer, PromptTokensDetails, Usage, UsageTimings
from server.api.sse import until_disconnect
from server.engine.engine import Engine
from server.errors import BadRequest, NotFound
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.service import Service
else:
    Service = Any  # FastAPI evaluates annotations; the service itself would import torch here


async def _service(request: Request) -> Service:  # async, or FastAPI would call it in a thread
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}


def check_model(service: Service, name: str | None) -> None:
    """Raise NotFound for a name that is not served; None stands for the served one."""
    if name is not None and name not in service.served_names:
        names = ", ".join(service.served_names)
        raise NotFound(f"the model {ascii(name)[:200]} is not served here; served: {names}",
                       param="model", code="model_not_found")  # fmt: skip
    current_record().model = name if name is not None else service.served_names[0]


def read_deadline(request: Request, service: Service) -> float | None:
    """Monotonic time by which the answer must be done: X-Request-Timeout, at most the server's own limit."""
    limit = service.config.request_timeout_s
    header = request.headers.get("x-request-timeout")
    if header is not None:
        try:
            asked = float(header)
        except ValueError:
            asked = math.nan
        if not 0 < asked < math.inf:
            raise BadRequest(f"X-Request-Timeout {ascii(header)[:50]} is no positive number of seconds",
                             param="X-Request-Timeout")  # fmt: skip
        limit = asked if limit is None else min(asked, limit)
    return None if limit is None else time.monotonic() + limit


async def take_model(request: Request, service: Service, deadline_s: float | None) -> tuple[Engine, Tokenizer]:
    """The model, which stays until this request has ended; one that sleeps is woken, and waited for until `deadline_s`
    (monotonic). To be called once the body is read and checked, so that no wrong request wakes it.

    Raises Overloaded, EngineError, DeadlineExceeded, ClientGone.
    """
    while not service.door.is_open:
        await until_disconnect(request.receive, service.wait_open(deadline_s))
    taken = service.ready()
    request.scope[VISIT].begin()
    return taken


def check_num_sequences(service: Service, *, n: int, num_prompts: int, param: str = "prompt") -> None:
    """Raise BadRequest where one call asks for more answers than the operator allows."""
    limit = service.config.max_sequences_per_request
    if n * num_prompts > limit:
        raise BadRequest(
            f"{num_prompts} prompts with n {n} are {n * num_prompts} answers; the limit is {limit} a request",
            param="n" if n > 1 else param,
        )


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Ids of a text, in a thread so that other requests' streams go on meanwhile."""
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def new_id(prefix: str) -> str:
    """A response id."""
    return f"{prefix}-{uuid.uuid4().hex}"


def json_answer(answer: Answer, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response model as a response."""
    return Response(answer.to_json(), status, headers, media_type="application/json")


def usage_wanted(body: GenerationBody) -> tuple[bool, bool]:
    """Whether a stream ends with the usage, and whether each of its chunks carries the usage so far."""
    options = body.stream_options
    return (False, False) if options is None else (bool(options.include_usage), bool(options.continuous_usage_stats))


def usage_of(counts: TokenCounts) -> Usage:
    """OpenAI's usage object, with times where the client asked for them."""
    usage = Usage(
        prompt_tokens=counts.prompt,
        completion_tokens=counts.completion,
        total_tokens=counts.prompt + counts.completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=counts.cached),
    )
    if counts.phases is not None:
        usage.timings = _timings(counts, counts.phases)
    return usage


def _timings(counts: TokenCounts, phases: Phases) -> UsageTimings:
    num_run = counts.prompt - counts.cached
    num_decoded = max(0, counts.completion - 1)  # the first token comes out of the prefill
    return UsageTimings(
        queue_ms=_ms(phases.queue_s),
        cache_n=counts.cached,
        prompt_n=num_run,
        prompt_ms=_ms(phases.prefill_s),
        prompt_per_second=_rate(num_run, phases.prefill_s),
        predicted_n=counts.completion,
        predicted_ms=_ms(phases.decode_s),
        predicted_per_second=_rate(num_decoded, phases.decode_s),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _rate(count: int, seconds: float | None) -> float | None:
    return round(count / seconds, 3) if count and seconds else None
