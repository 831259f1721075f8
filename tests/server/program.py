"""`python -m server` in a process of its own: start it, wait until it is ready, read its metrics, end it in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from models import REPOSITORY
from prometheus_client.parser import text_string_to_metric_families


@dataclass(slots=True)
class Server:
    """A running server process."""

    process: subprocess.Popen[str]
    url: str
    first_answer_s: float  # from the start of the process to the first HTTP answer
    phases: list[str]  # as /ready told them

    def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics."""
        text = httpx.get(f"{self.url}/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        raise KeyError(name)


def start(model: Path, cache: Path, *arguments: str, wait: bool = True) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "--model", str(model), "--port", str(port), "--threads", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPQ_")}
    environment |= {"SPQ_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
    )
    server = Server(process, f"http://127.0.0.1:{port}", 0.0, [])
    while wait and time.monotonic() < started + 120:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        try:
            answer = httpx.get(f"{server.url}/ready", timeout=5)
        except httpx.TransportError:
            time.sleep(0.02)
            continue
        server.first_answer_s = server.first_answer_s or time.monotonic() - started
        server.phases.append(answer.json()["phase"])
        if answer.status_code == 200:
            return server
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
        time.sleep(0.02)
    assert not wait, "not ready within two minutes"
    return server


def end(server: Server) -> tuple[int, str]:
    server.process.send_signal(signal.SIGTERM)
    try:
        _, log = server.process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        server.process.kill()
        _, log = server.process.communicate()
    return server.process.returncode, log
