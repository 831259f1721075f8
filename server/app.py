"""The application: routes, failure handlers and middleware around a `Service`. No logic of its own.

All state is the service's, on `app.state`; nothing is global, so several apps can live in one process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from server.api import admin, admin_actions, chat, completions, docs, embeddings, load, responses_api, text
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

CORS_ASKED = ("Authorization", "Content-Type", "X-Request-Id", "X-Request-Timeout", "X-Include-Timings")
CORS_TOLD = ("X-Request-Id", "Retry-After")


def create_app(service: Service) -> FastAPI:
    """An ASGI app. Its lifespan starts the service and drains it at the end.

    Raises KeyFileError and OSError where the API keys cannot be read.
    """
    config = service.config
    keys = read_keys(config)
    admin_key = read_admin_key(config, keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.drain()
            service.close()

    # FastAPI's own page would load scripts from elsewhere; ours is in server.api.docs.
    app = FastAPI(title="spq-serve", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.responses = ResponseStore(service.config.response_store_bytes)
    service.metrics.bind(
        stats=service.stats,
        status=service.status,
        info=service.info,
    )
    for module in (completions, chat, responses_api, embeddings, text, load, admin, admin_actions, docs, page):
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
            allow_headers=CORS_ASKED,
            expose_headers=CORS_TOLD,
        )
    app.add_middleware(RequestContext, metrics=service.metrics, on_end=(AccessLog(config.access_log),))
    return app
