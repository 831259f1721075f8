"""The web server around the app: uvicorn as it is run here, draining on the first signal. No options."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import ssl
import time
from types import FrameType
from typing import cast

import uvicorn

from server.app import create_app
from server.connection import Connection, most_connections
from server.service import Service

logger = logging.getLogger(__name__)

CONNECTIONS_END_S = 5  # after the drain: time for sockets to close
ECHO_S = 1.0  # a signal this soon after the first is the same one, sent to the whole process group


class DrainingServer(uvicorn.Server):
    """uvicorn that keeps the port open while it drains, so that probes see 503 and clients a Retry-After."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None
        self._first_signal_s = 0.0
        self.failed = False
        service.on_failure = self._fail

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then exit. A later one: exit at once; a process group's echo of the first is none."""
        if self._drain is None:
            self._first_signal_s = time.monotonic()
            self._drain = asyncio.get_running_loop().create_task(self._drain_then_exit())
        elif time.monotonic() - self._first_signal_s > ECHO_S:
            logger.warning("stopped without waiting for the requests in progress")
            os._exit(1)

    async def _drain_then_exit(self) -> None:
        await self._service.drain()
        self.should_exit = True

    def _fail(self) -> None:
        self.failed = True
        self.should_exit = True


def make_server(service: Service) -> DrainingServer:
    """The web server as it is run here, for `service`; not started.

    Raises KeyFileError, or OSError (ssl.SSLError is one), where keys or certificate cannot be used.
    """
    options = service.config
    if options.tls_cert is not None and options.tls_key is not None:  # uvicorn would look when it starts, and raise
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(options.tls_cert, options.tls_key)
    connection = functools.partial(
        Connection,
        client_timeout_s=options.client_timeout_s,
        most=most_connections(),
        rejected=service.metrics.rejected,
    )
    config = uvicorn.Config(
        create_app(service),
        http=cast("type[asyncio.Protocol]", connection),
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,  # server.app writes one line a request, with its id
        lifespan="on",  # "auto" takes a failure in it for an app without one, and never starts
        timeout_graceful_shutdown=CONNECTIONS_END_S,
        server_header=False,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    return DrainingServer(config, service)
