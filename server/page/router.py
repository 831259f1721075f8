"""`GET /` and the files of the page. Only sends files: all numbers and answers reach the page through the public API.

The page needs no key, because it holds nothing: what it asks for does. It may load from this origin alone, may not be
framed, and Trusted Types forbid it to turn text into markup, so that a model's words cannot become elements.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.errors import NotFound

router = APIRouter(include_in_schema=False)

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, by ETag: a restarted server may be a newer one
}
PLACES = {
    "models": "/v1/models",
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "docs": "/docs",
    "openapi": "/openapi.json",
    "ready": "/ready",
    "metrics": "/metrics",
}


@router.get("/")
async def index(request: Request) -> Response:
    """The page for whoever accepts HTML, as browsers do; for others a small JSON of paths."""
    if "text/html" in request.headers.get("accept", ""):
        return _send(request, "index.html", {"Vary": "Accept"})
    return JSONResponse(PLACES, headers={"Vary": "Accept"})


@router.get("/page/{name}")
async def file(name: str, request: Request) -> Response:
    """One file of the page. Raises NotFound."""
    return _send(request, name, {})


def _send(request: Request, name: str, extra: dict[str, str]) -> Response:
    """The file, or 304 where the browser has it. Only names that the folder lists are read."""
    files = {entry.name: entry for entry in resources.files("server.page").joinpath("static").iterdir()}
    suffix = name[name.rfind(".") :]
    if name not in files or suffix not in MEDIA_TYPES:
        raise NotFound(f"the page has no file {ascii(name)[:100]}")
    content = files[name].read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, **extra, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers={**headers, "Content-Type": MEDIA_TYPES[suffix]})
