"""The server on Ray Serve: `serve run server.ray_app:app model=FOLDER`. Replicas on the machines of a cluster.

Each replica is the application that `spq-serve` runs (`server.app.create_app`) with a model and an engine of its own,
in a process that Ray starts, watches and ends. Not the edge (`server.ray_edge` runs in Ray's proxy) and not how many
replicas there are and where (Ray's configuration, `deploy/ray/serve.yaml`). What Ray does in the place of this server's
own web server is refused as an option, not ignored. Needs the extra `ray`; nothing else imports this. docs/cluster.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.admin import find_problem
from server.api.failures import error_response
from server.app import create_app
from server.cli import OPTIONS, WrongOption, make_config, set_up_logging
from server.config import ServerConfig
from server.errors import EngineError, NotFound
from server.ray_metrics import Published
from server.service import Service

NAME = "spq"  # of the deployment, in Ray's configuration too
# Requests a replica gets beyond the sequences it runs: the next one is at hand when a sequence ends, and probes get in.
# The others wait in Ray's proxies, where the first replica with room takes them and a replica's end loses none.
AT_HAND = 16
END_S = 5.0  # a replica's own end, after its requests had the drain timeout
HEALTH_EVERY_S = 10.0
HEALTH_TIMEOUT_S = 30.0  # loading holds the interpreter's lock for seconds at a time

REFUSED = {  # by the names of their flags
    "host": "Ray's proxy listens: set http_options.host in the configuration of serve",
    "port": "Ray's proxy listens: set http_options.port in the configuration of serve",
    "tls-cert": "Ray's proxy listens: end TLS there or before it",
    "tls-key": "Ray's proxy listens: end TLS there or before it",
    "client-timeout": "Ray's proxy has the connections, and no such limit: put a proxy such as nginx before it",
    "admin-key": "a request to /admin would reach one replica of several; use serve deploy, serve status",
    "sleep-idle-seconds": "Ray keeps the GPU for a replica that sleeps; autoscaling_config.min_replicas ends them",
    "response-store": "an answer is kept by one replica, and the next request may reach another",
}
# Of one replica among several, so that an answer would be by chance.
OF_ONE = frozenset({"/metrics", "/load", "/v1/load"})


def app(args: dict[str, Any]) -> serve.Application:
    """The application, by options under the names of the flags, then the SPQ_* variables of where this runs.

    Raises WrongOption, also for what Ray does in this server's place.
    """
    return make_deployment(read_options(args)).bind()


def make_deployment(config: ServerConfig) -> serve.Deployment:
    """Replicas of one configuration. How many, and on what, is left to Ray's configuration."""

    def build() -> ASGIApp:  # on the replica
        return Loaded(with_own_threads(config))

    return serve.deployment(
        serve.ingress(build)(Replica),
        name=NAME,
        max_ongoing_requests=config.max_num_seqs + AT_HAND,
        max_queued_requests=config.max_queue,
        graceful_shutdown_timeout_s=config.drain_timeout_s + END_S,
        health_check_period_s=HEALTH_EVERY_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
    )


def read_options(args: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> ServerConfig:
    """Options as YAML has them: `max_num_seqs: 64`, `prefix-caching: false`, `api_key: [a, b]`. Raises WrongOption."""
    arguments = []
    for name, value in args.items():
        for one in value if isinstance(value, list | tuple) else (value,):
            text = ("on" if one else "off") if isinstance(one, bool) else str(one)
            arguments.append(f"--{name.replace('_', '-')}={text}")
    config = make_config(arguments, environment)
    for option in (option for group in OPTIONS.values() for option in group if option.flag in REFUSED):
        if option.name in config.model_fields_set:
            raise WrongOption(f"--{option.flag} ({option.variable}) is not for replicas on Ray: {REFUSED[option.flag]}")
    return config.model_copy(update={"response_store_bytes": 0})


def with_own_threads(config: ServerConfig) -> ServerConfig:
    """On a replica: where no number of threads was asked for, the CPUs that Ray has set aside for it."""
    if config.threads is not None:
        return config
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    return config.model_copy(update={"threads": max(1, int(cpus))})


class Loaded:
    """The application, whose start-up ends when the model serves: from then on Ray sends requests to the replica."""

    def __init__(self, config: ServerConfig) -> None:
        set_up_logging(config)
        self.service = Service(config)
        self._app = create_app(self.service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection event."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] in OF_ONE:
            error = NotFound(f"{scope['path']} is about one server; this is one of several replicas: docs/cluster.md")
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_when_loaded(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                await self.service.wait_started()
            await send(message)

        publishing = asyncio.create_task(Published(self.service.metrics.registry).go_on())
        try:
            await self._app(scope, receive, send_when_loaded)
        finally:
            publishing.cancel()


class Replica:
    """What Ray asks of a replica beside requests. Its `app` comes from serve.ingress."""

    app: Loaded

    async def check_health(self) -> None:
        """Raise EngineError where only a new replica helps; Ray then starts one."""
        problem = find_problem(self.app.service)
        if problem is not None:
            raise EngineError(problem)
