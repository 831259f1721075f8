"""The application: routes, failure handlers and middleware around a `Service`. No logic of its own.

All state is the service's, on `app.state`; nothing is global, so several apps can live in one process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.middleware.cors import CORSMiddleware

from server.api import (
    admin,
    admin_actions,
    chat,
    completions,
    docs,
    embeddings,
    load,
    messages_api,
    responses_api,
    text,
)
from server.api.access_log import AccessLog
from server.api.admin_key import AdminKey, read_admin_key
from server.api.failures import install_handlers
from server.api.keys import ApiKey, read_keys
from server.api.limits import RateLimit
from server.api.middleware import BodyLimit, RequestContext, Shed
from server.api.presence import Presence
from server.api.response_store import ResponseStore
from server.page import router as page

if TYPE_CHECKING:
    from server.service import Service
    from server.traces import Traces

RATES = ("limit-requests", "remaining-requests", "limit-tokens", "remaining-tokens")
CORS_TOLD = ("X-Request-Id", "Retry-After", *(f"x-ratelimit-{name}" for name in RATES))
# FastAPI 0.165 can send traces, metrics and messages of exceptions by itself, where FASTAPI_OTEL_AUTO_CONFIGURE is set;
# those messages could hold what a client wrote.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(service: Service) -> FastAPI:
    """An ASGI app. Its lifespan starts the service and drains it at the end.

    Raises KeyFileError and OSError where the API keys cannot be read, ValueError where traces cannot be sent.
    """
    config = service.config
    keys = read_keys(config)
    admin_key = read_admin_key(config, keys)
    traces = None if config.otlp_endpoint is None else _make_traces(config.otlp_endpoint, service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        if traces is not None:
            traces.start()
        try:
            yield
        finally:
            await service.drain()
            service.close()
            if traces is not None:
                await asyncio.to_thread(traces.close)

    # FastAPI's own page would load scripts from elsewhere; ours is in server.api.docs.
    app = FastAPI(
        title="spq-serve",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
    )
    app.state.service = service
    app.state.responses = ResponseStore(service.config.response_store_bytes)
    service.metrics.bind(
        stats=service.stats,
        status=service.status,
        info=service.info,
    )
    for module in (completions, chat, responses_api, messages_api, embeddings, text, load, admin, admin_actions):
        app.include_router(module.router)
    for module in (docs, page):
        app.include_router(module.router)
    docs.install_schema(app)
    install_handlers(app, service.metrics)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)  # the last one added is outermost
    app.add_middleware(Presence, door=service.door)
    app.add_middleware(RateLimit, keys=keys, metrics=service.metrics)
    app.add_middleware(Shed, check_room=service.check_room, metrics=service.metrics)
    app.add_middleware(ApiKey, keys=keys)
    app.add_middleware(AdminKey, key=admin_key)
    if config.cors_origins:  # outside the keys: a browser's preflight has none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients add their own, such as x-stainless-os; none of them opens anything
            expose_headers=CORS_TOLD,
        )
    sinks = (AccessLog(config.access_log),) if traces is None else (AccessLog(config.access_log), traces)
    app.add_middleware(RequestContext, metrics=service.metrics, on_end=sinks)
    return app


def _make_traces(endpoint: str, service: Service) -> Traces:
    """Raises ValueError with the remedy where the extra is missing, and for OTEL_* variables that mean nothing."""
    try:
        from server.traces import Traces
    except ImportError as error:
        raise ValueError(
            f"--otlp-endpoint: packages are missing ({error}); install the extra: pip install 'spq-serve[otel]'"
        ) from error
    return Traces(endpoint, service.status)
