"""Every failure a client can see, in the one body OpenAI clients read.

Raised where the cause is known; `server.app` turns them into responses. Messages say value, limit and remedy.
"""

from __future__ import annotations

from typing import Any

# OpenAI's words, not only its code: LiteLLM and others know the case by them
TOO_LONG = "this model's maximum context length is"


class ServeError(Exception):
    """Base: HTTP status, OpenAI `type`, machine-readable `code`, the parameter at fault, extra headers."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = headers or {}

    def to_openai(self) -> dict[str, Any]:
        """The body: {"error": {message, type, param, code}}."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(ServeError):
    """400: the request itself is wrong."""

    status, type, code = 400, "invalid_request_error", "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code


class Unauthorized(ServeError):
    """401: no key, or a wrong one."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ServeError):
    """403: the operator has not allowed this."""

    status, type, code = 403, "permission_error", "forbidden"


class NotFound(ServeError):
    """404: unknown route or model."""

    status, type, code = 404, "not_found_error", "not_found"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        if code is not None:
            self.code = code


class MethodNotAllowed(ServeError):
    """405: the route exists, the method does not; `Allow` says what does."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(ServeError):
    """408: the client stopped in the middle of its request."""

    status, type, code = 408, "invalid_request_error", "request_timeout"


class Conflict(ServeError):
    """409: not in the state the server is in."""

    status, type, code = 409, "invalid_request_error", "conflict"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class PayloadTooLarge(ServeError):
    """413: the body is larger than the operator allows."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedMediaType(ServeError):
    """415: the body is not declared as JSON."""

    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class Overloaded(ServeError):
    """503 with Retry-After: queue full, still starting, or draining. Stock clients retry by themselves."""

    status, type, code = 503, "overloaded_error", "queue_full"

    def __init__(self, message: str, *, retry_after_s: int, code: str | None = None) -> None:
        super().__init__(message, headers={"Retry-After": str(max(1, retry_after_s))})
        if code is not None:
            self.code = code


class RateLimited(ServeError):
    """429 with Retry-After: a key has used what it may a minute. `what` is requests or tokens, OpenAI's type."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, message: str, *, what: str, retry_after_s: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})
        self.type = what


class Unhealthy(ServeError):
    """503 of the health check: only a restart helps."""

    status, type, code = 503, "server_error", "unhealthy"


class DeadlineExceeded(ServeError):
    """504: the request's own deadline passed; a stock client must not retry it."""

    status, type, code = 504, "timeout_error", "deadline_exceeded"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"x-should-retry": "false"})


class EngineError(ServeError):
    """500: a step failed; every stream that was part of it ends with this."""

    code = "engine_error"
