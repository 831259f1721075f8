"""The OpenAPI document at /openapi.json, made complete, and the page at /docs that shows it.

The page's script and style come from a package (`fastapi_offline`), not from the network: it works without one, and
its Content-Security-Policy lets a browser load nothing from elsewhere.
"""

from __future__ import annotations

from importlib import metadata, resources
from typing import Any

import fastapi_offline
from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response

from server.api.examples import ERRORS, EXAMPLES, Example
from server.errors import NotFound

router = APIRouter(include_in_schema=False)

DESCRIPTION = (
    "An OpenAI-compatible server for LLaMA models compressed with SPQ. Fields that are not served are refused by name. "
    "Every failure has OpenAI's error body, and every answer an X-Request-Id."
)
ASSETS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon.png": "image/png",
}
ADMIN = "/admin/"  # what stands below it has a key of its own
DOCS_PATHS = frozenset({"/docs", *(f"/docs/{name}" for name in ASSETS)})
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'"
)
UI_OPTIONS = {"validatorUrl": None, "tryItOutEnabled": True}  # its validator would send the document away


def package_version() -> str:
    """The version of this server, as installed."""
    try:
        return metadata.version("spq-serve")
    except metadata.PackageNotFoundError:  # run from a clone that is not installed
        return "unknown"


@router.get("/docs")
async def page() -> Response:
    """Swagger UI over /openapi.json."""
    html = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="spq-serve",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="/docs/favicon.png",
        swagger_ui_parameters=UI_OPTIONS,
    )
    html.headers["Content-Security-Policy"] = POLICY
    return html


@router.get("/docs/{name}")
async def asset(name: str) -> Response:
    """A file of the page."""
    if name not in ASSETS:
        raise NotFound(f"no route /docs/{ascii(name)[1:-1]}")
    content = (resources.files(fastapi_offline) / "static" / name).read_bytes()
    return Response(content, media_type=ASSETS[name], headers={"Cache-Control": "max-age=86400"})


def install_schema(app: FastAPI) -> None:
    """Let the app's document say what FastAPI does not know: keys, streams, examples, what errors look like."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(
                get_openapi(title="spq-serve", version=package_version(), description=DESCRIPTION, routes=app.routes)
            )
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(schema: dict[str, Any]) -> dict[str, Any]:
    schema["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "where the operator has set --api-key"},
        "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "the same key"},
        "admin": {"type": "http", "scheme": "bearer", "description": "of --admin-key; without one /admin is closed"},
    }
    schema["security"] = [{}, {"key": []}, {"x_api_key": []}]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            _exemplify(operation, EXAMPLES[method, path])
            if path.startswith(ADMIN):
                operation["security"] = [{"admin": []}]
    return schema


def _exemplify(operation: dict[str, Any], example: Example) -> None:
    if example.request is not None:
        operation["requestBody"]["content"]["application/json"]["example"] = example.request
    content = operation["responses"]["200"]["content"]
    if isinstance(example.response, str):
        content.clear()
        content["text/plain"] = {"schema": {"type": "string"}}
    for kind in content.values():
        kind["example"] = example.response
    if example.stream is not None:
        operation["responses"]["200"]["description"] = "The whole answer, or with stream: true its events"
        content["text/event-stream"] = {"schema": {"type": "string"}, "example": example.stream}
    for status, error in ERRORS.items():
        if status in operation["responses"]:
            answer = operation["responses"][status]
            answer["description"] = "What is wrong, in OpenAI's error body"
            answer["content"]["application/json"]["example"] = {"error": error}
