"""Reads a request's body as strict JSON before FastAPI validates it.

FastAPI's own reading accepts NaN, answers 422, and hides our errors behind its own; this route class replaces only
that part, so that models, OpenAPI and dependencies stay FastAPI's.
"""

from __future__ import annotations

import email.message
import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from server.errors import BadRequest, UnsupportedMediaType


class _ParsedRequest(Request):
    """A request whose JSON was read already."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class JSONRoute(APIRoute):
    """A route that takes JSON: 415 for another content type, 400 for what is not JSON. No body at all is fine where the
    handler has a default for it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind our reading of the body."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler
        required = self.body_field.field_info.is_required()

        async def read_then_handle(request: Request) -> Response:
            parsed = _ParsedRequest(request.scope, request.receive)
            if required or await parsed.body():
                check_content_type(request.headers.get("content-type", ""))
                parsed.parsed = parse_json(await parsed.body())
            return await handler(parsed)

        return read_then_handle


def check_content_type(value: str) -> None:
    """Raise UnsupportedMediaType unless `value` is JSON."""
    message = email.message.Message()
    message["content-type"] = value
    kind = message.get_content_type() if value else "nothing"
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaType(f"the body is declared as {ascii(kind)[1:-1]}; send Content-Type: application/json")


def parse_json(body: bytes) -> Any:
    """JSON as the standard has it: UTF-8, no NaN or Infinity. Raises BadRequest."""
    if not body:
        raise BadRequest("the body is empty; send a JSON object", code="invalid_json")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: byte {error.start} is invalid", code="invalid_json") from error
    except json.JSONDecodeError as error:
        raise BadRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}", code="invalid_json"
        ) from error
    except RecursionError as error:
        raise BadRequest("the JSON is nested too deeply", code="invalid_json") from error
    except ValueError as error:  # a number with thousands of digits
        raise BadRequest(f"the JSON has a number this server cannot hold: {error}", code="invalid_json") from error


def _refuse_constant(name: str) -> NoReturn:
    raise BadRequest(f"the body is not JSON: {name} is no JSON number", code="invalid_json")
