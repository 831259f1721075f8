"""POST /admin/reload, /drain, /sleep, /wake: what the operator does to a server that runs. Its key: `admin_key`.

Each answers once it is done, one at a time in the order they came; asking for what is so already is fine.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import Response

from server.api.body import JSONRoute
from server.api.deps import ERRORS, ServiceDep, json_answer
from server.api.protocol import Strict
from server.api.responses import Answer

if TYPE_CHECKING:
    from server.service import Service

router = APIRouter(prefix="/admin", route_class=JSONRoute)


class AdminRequest(Strict):
    """The body of an action without options; it may be left out."""


class SleepRequest(Strict):
    """The body of /admin/sleep; it may be left out."""

    wait: bool = False  # for the requests that are inside; else they are a 409


class AdminAnswer(Answer):
    """What came of it."""

    phase: str  # as in /ready
    seconds: float  # it took


@router.post("/reload", response_model=AdminAnswer, responses=ERRORS)
async def reload(service: ServiceDep, body: AdminRequest | None = None) -> Response:
    """Let requests end while new ones wait, drop the model, load it anew from its place. Answers when it is ready, or
    500 with the reason; nothing is served then, for the one before is gone."""
    return await _do(service, service.life.reload())


@router.post("/drain", response_model=AdminAnswer, responses=ERRORS)
async def drain(service: ServiceDep, body: AdminRequest | None = None) -> Response:
    """Refuse new requests, let the others end within the drain timeout, drop the model. Lasts until wake or reload."""
    return await _do(service, service.life.drain())


@router.post("/sleep", response_model=AdminAnswer, responses=ERRORS)
async def sleep(service: ServiceDep, body: SleepRequest | None = None) -> Response:
    """Drop the model until the next request. 409 while requests are inside, unless wait is true."""
    return await _do(service, service.life.sleep(wait=body is not None and body.wait))


@router.post("/wake", response_model=AdminAnswer, responses=ERRORS)
async def wake(service: ServiceDep, body: AdminRequest | None = None) -> Response:
    """Have the model ready: after a sleep, a drain or a failure."""
    return await _do(service, service.life.wake())


async def _do(service: Service, action: Awaitable[None]) -> Response:
    started = time.monotonic()
    await action
    return json_answer(AdminAnswer(phase=service.status().phase, seconds=round(time.monotonic() - started, 3)))
