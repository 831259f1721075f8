"""One server in a comparison: started here and ended here, or found running under an address."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from loadtest import discover
from loadtest.process import Running
from loadtest.servers import Server

START_LIMIT_S = 900
OPTIONS_OF_SERVERS = ("SPQ_", "LLAMA_", "VLLM_", "OMP_")  # variables that would set what the commands do not say


class Contender:
    """A server with the process that runs it, if that was started here."""

    def __init__(
        self,
        server: Server,
        values: dict[str, str],
        environment: Mapping[str, str],
        logs: Path,
        api_key: str | None = None,
    ) -> None:
        """Raises KeyError with the name of a path that `values` lacks, ValueError for an address that is not http."""
        self.api_key = None
        if server.url is None:
            self.host = "127.0.0.1"
            with socket.socket() as probe:
                probe.bind((self.host, 0))
                self.port = int(probe.getsockname()[1])
        else:
            parts = urlsplit(server.url)
            if parts.scheme != "http" or parts.hostname is None or parts.path.strip("/"):
                raise ValueError(f"{server.url}: give the server's root, such as http://127.0.0.1:8000")
            self.host, self.port = parts.hostname, parts.port or 80
            self.api_key = api_key
        self.template = server  # without the paths of this machine
        self.server = server.filled(values | {"port": str(self.port)})
        self._environment = {k: v for k, v in environment.items() if not k.startswith(OPTIONS_OF_SERVERS)}
        self._log = logs / f"{server.name}.log"
        self._process: Running | None = None

    def cannot_run(self, cpu_flags: Sequence[str]) -> str | None:
        """Why this machine cannot run it, as far as that is known beforehand."""
        if self.server.needs is None or self.server.needs[0] in cpu_flags:
            return None
        return f"this CPU has no {self.server.needs[0]}: {self.server.needs[1]}"

    @property
    def is_ours_to_run(self) -> bool:
        """Whether it is started here."""
        return self.server.url is None

    @property
    def root(self) -> str:
        """Its address."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> float:
        """Start it, if it is ours to run, and wait until it is ready; returns how many seconds. Raises NotReady."""
        if not self.is_ours_to_run:
            return 0.0
        self._process = Running(self.server.command, self._environment | dict(self.server.env), self._log)
        return self._process.wait_ready(f"{self.root}{self.server.ready}", START_LIMIT_S)

    def stop(self) -> None:
        """End it, if it runs and was started here."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def sleep(self) -> None:
        """Stop it from taking CPU, if it was started here."""
        if self._process is not None:
            self._process.sleep()

    def wake(self) -> None:
        """Let it go on."""
        if self._process is not None:
            self._process.wake()

    def metrics(self) -> discover.Samples:
        """Its /metrics now; empty where it has none."""
        return discover.read_metrics(self.root, self.api_key)

    @property
    def session(self) -> int | None:
        """Of its processes; None where they are not ours."""
        return None if self._process is None else self._process.session

    @property
    def running(self) -> Running:
        """The process; a start must have come first."""
        assert self._process is not None, f"{self.server.name} was not started here"
        return self._process
