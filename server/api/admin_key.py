"""The operator's key: what `/admin/` asks for, and nothing else takes. Without --admin-key there is no way in.

Not the keys of clients (`server.api.keys`), which open nothing here, as this one opens nothing there; nor taken from
x-api-key, which only clients of /v1/messages need.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.docs import ADMIN
from server.api.failures import error_response
from server.api.keys import Key, KeyFileError, digest, find_bearer
from server.api.record import current_record
from server.config import ServerConfig
from server.errors import Forbidden, ServeError, Unauthorized

NAME = "(admin)"  # in the access log; no client's key can have it


def read_admin_key(config: ServerConfig, keys: Sequence[Key]) -> Key | None:
    """The key of --admin-key. Raises KeyFileError where a client has the same."""
    if config.admin_key is None:
        return None
    key = Key(NAME, digest(config.admin_key.encode()))
    for other in keys:
        if other.digest == key.digest:
            raise KeyFileError(f"the admin key is also the API key {other.name}; clients must not have it")
    return key


class AdminKey:
    """403 on all of `/admin/` where there is no key, 401 without it; both before the body is read."""

    def __init__(self, app: ASGIApp, key: Key | None) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] == "http" and scope["path"].startswith(ADMIN):
            refusal = self._refusal(Headers(scope=scope))
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
            current_record().key = NAME
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ServeError | None:
        if self.key is None:
            return Forbidden("/admin is closed: the server was started without --admin-key (SPQ_ADMIN_KEY)")
        if find_bearer((self.key,), headers.get("authorization", "")) is None:
            return Unauthorized(
                "the admin key is needed; send it as Authorization: Bearer KEY. An API key does not do",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None
