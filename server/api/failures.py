"""Every failure as OpenAI's error body: our errors, FastAPI's validation errors, the router's 404 and 405.

No routes and no middleware. A client sees a message, a type, the field at fault and a code; never a traceback.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.api.record import current_record
from server.errors import BadRequest, EngineError, MethodNotAllowed, NotFound, Overloaded, ServeError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_LISTED = 5
MAX_INPUT_CHARS = 200
CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that left; nobody receives it

Handler = Callable[[Request, Exception], Awaitable[Response]]


class ClientGone(Exception):
    """The client closed the connection before the answer was ready."""


def error_fields(error: ServeError) -> dict[str, Any]:
    """The body as an object; the request's record takes note of it."""
    current_record().error = error.code
    return error.to_openai()


def error_body(error: ServeError) -> bytes:
    """The JSON body. ASCII only: what is echoed may not be valid Unicode."""
    return json.dumps(error_fields(error), ensure_ascii=True).encode()


def error_response(error: ServeError) -> Response:
    """The whole response, with the error's own headers."""
    return Response(error_body(error), error.status, error.headers, media_type="application/json")


def fold_validation_errors(errors: Sequence[Any]) -> BadRequest:
    """One 400 for all that is wrong with a body: `param` is the first field at fault, up to five are listed."""
    described = [_describe(error) for error in errors[:MAX_LISTED]]
    message = "; ".join(f"{param}: {text}" if param else text for param, text in described)
    if len(errors) > MAX_LISTED:
        message += f"; and {len(errors) - MAX_LISTED} more"
    kind = errors[0]["type"]
    code = {"extra_forbidden": "unknown_parameter", "not_served": "unsupported_value", "missing": "missing_parameter"}
    return BadRequest(message, param=described[0][0] or None, code=code.get(kind))


def install_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Register the handlers; every 503 that is our choice counts as a rejection."""

    async def on_serve_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ServeError)
        if isinstance(error, Overloaded):
            metrics.rejected(str(error.code))
        if isinstance(error, EngineError):
            logger.error("request failed: %s", error.message)
        return error_response(error)

    async def on_validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(fold_validation_errors(error.errors()))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(_from_http(request, error))

    async def on_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    handlers: dict[type[Exception], Handler] = {
        ServeError: on_serve_error,
        RequestValidationError: on_validation_error,
        HTTPException: on_http_error,
        ClientGone: on_gone,
        ClientDisconnect: on_gone,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _from_http(request: Request, error: HTTPException) -> ServeError:
    path = request.url.path
    if error.status_code == 404:
        return NotFound(f"no route {path}; this server has /v1/completions and /v1/chat/completions, among others")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        names = sorted({name.strip() for name in allowed.split(",") if name.strip()})
        if "GET" in names and "HEAD" not in names:
            names.append("HEAD")
        text = ", ".join(names)
        return MethodNotAllowed(f"{path} does not take {request.method}; it takes {text}", headers={"Allow": text})
    if 400 <= error.status_code < 500:
        return BadRequest(str(error.detail))
    return ServeError(str(error.detail))


def _describe(error: Any) -> tuple[str, str]:
    """(field path, what is wrong with it) of one pydantic error."""
    location = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
    param = (error.get("ctx") or {}).get("param") or _path(location)
    if error["type"] == "extra_forbidden":
        return param, "unknown field"
    if error["type"] == "missing":
        return param, "required, but missing"
    text = str(error["msg"]).replace("Input should", "should")
    got = ascii(error.get("input"))
    shown = got if len(got) <= MAX_INPUT_CHARS else got[:MAX_INPUT_CHARS] + "..."
    return param, text if isinstance(error.get("input"), dict) and not location else f"{text} (got {shown})"


def _path(location: Sequence[int | str]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
