"""API keys: whose they are, what each may use, and the check of a request's. Limits: `server.api.limits`.

Keys are kept as SHA-256 digests, so that comparing takes the same time whatever is sent, and no key can be logged.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.docs import ADMIN, DOCS_PATHS
from server.api.failures import error_response
from server.api.record import current_record
from server.config import ServerConfig
from server.errors import Unauthorized

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/version", "/openapi.json"}) | DOCS_PATHS
PAGE = "/page/"  # files of the page: it holds nothing, and asks with the key that its user gives
NAME = r"[A-Za-z0-9_.-]{1,64}"
# KEY, or NAME=KEY; padding of base64 at the end of a key names nothing
NAMED_KEY = re.compile(rf"({NAME})=(.*[^=].*)", re.DOTALL)


class KeyFileError(ValueError):
    """Keys that cannot be used; the message says which and why, and shows none."""


@dataclass(frozen=True, slots=True)
class Key:
    """A client's key, and how much it may use a minute; None is without limit."""

    name: str
    digest: bytes  # SHA-256
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class _Entry(BaseModel):
    """One table of a key file: the key or its digest, and limits that take the place of the common ones."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    key: str | None = Field(None, min_length=1)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, gt=0)
    tokens_per_minute: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        return self

    def digest(self) -> bytes:
        """Of the key."""
        return digest(self.key.encode()) if self.key is not None else bytes.fromhex(self.sha256 or "")


def read_keys(config: ServerConfig) -> tuple[Key, ...]:
    """The keys of --api-key and --api-key-file. Raises KeyFileError, OSError."""
    common = (config.requests_per_minute, config.tokens_per_minute)
    keys = []
    for number, text in enumerate(config.api_keys, start=1):
        named = NAMED_KEY.fullmatch(text)
        name, secret = (named[1], named[2]) if named else (f"key-{number}", text)
        keys.append(Key(name, digest(secret.encode()), *common))
    if config.api_key_file is not None:
        keys += _read_file(config.api_key_file, *common)
    for i, key in enumerate(keys):
        for other in keys[:i]:
            if other.name == key.name:
                raise KeyFileError(f"two API keys have the name {key.name}")
            if other.digest == key.digest:
                raise KeyFileError(f"{other.name} and {key.name} are the same API key")
    return tuple(keys)


def _read_file(path: Path, requests_per_minute: int | None, tokens_per_minute: int | None) -> list[Key]:
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} is no TOML: {error}") from error
    keys = []
    for name, table in tables.items():
        if not re.fullmatch(NAME, name) or not isinstance(table, dict):
            raise KeyFileError(f"{path}: {name} is no table of a key; write [NAME] with key or sha256 below it")
        try:
            entry = _Entry.model_validate(table, strict=True)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            raise KeyFileError(f"{path}: {'.'.join([name, *map(str, first['loc'])])}: {first['msg']}") from error
        requests = entry.requests_per_minute or requests_per_minute
        keys.append(Key(name, entry.digest(), requests, entry.tokens_per_minute or tokens_per_minute))
    if not keys:
        raise KeyFileError(f"{path} holds no key; write [NAME] with key or sha256 below it")
    return keys


def digest(key: bytes) -> bytes:
    """What is kept and compared of a key."""
    return hashlib.sha256(key).digest()


def find_key(keys: Sequence[Key], headers: Headers) -> Key | None:
    """Whose key a request holds: as Authorization: Bearer, or in Anthropic's header."""
    return find_bearer(keys, headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}")


def find_bearer(keys: Sequence[Key], authorization: str) -> Key | None:
    """Whose key stands in an Authorization header."""
    scheme, _, secret = authorization.partition(" ")
    given = digest(secret.strip().encode("latin-1"))
    # All keys are compared, so that the time says nothing about which one is near.
    matches = [key for key in keys if hmac.compare_digest(given, key.digest)]
    return matches[0] if matches and scheme.lower() == "bearer" else None


class ApiKey:
    """401 before the body is read, on every path that is neither open nor the operator's."""

    def __init__(self, app: ASGIApp, keys: Sequence[Key]) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] == "http" and self.keys and not _is_open(scope["path"]):
            key = find_key(self.keys, Headers(scope=scope))
            if key is None:
                error = Unauthorized(
                    "a valid API key is needed; send it as Authorization: Bearer KEY, or as x-api-key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error_response(error)(scope, receive, send)
                return
            current_record().key = key.name
        await self.app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith((PAGE, ADMIN))
