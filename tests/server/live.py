"""A real server in this process: service, engine and demo model behind uvicorn on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from models import real_model
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.config import ServerConfig
from server.service import Service


@dataclass(slots=True)
class Live:
    """A running server."""

    service: Service
    url: str

    def phase(self) -> str:
        """As /ready says, which wakes nobody."""
        return str(httpx.get(f"{self.url}/ready").json()["phase"])

    def until(self, phase: str, timeout_s: float = 30.0) -> None:
        """Wait for a phase."""
        end = time.monotonic() + timeout_s
        while (seen := self.phase()) != phase:
            assert time.monotonic() < end, f"{seen}, not {phase}"
            time.sleep(0.02)

    def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics, summed over labels that are not given."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def admin(self, action: str, key: str = "operator", **body: Any) -> httpx.Response:
        """POST /admin/..."""
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}/admin/{action}", headers=headers, json=body or None, timeout=120)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json={"model": "demo", **body}, timeout=120)

    def complete(self, prompt: str = "It was", **body: Any) -> Any:
        """The first choice of a completion."""
        answer = self.post("/v1/completions", prompt=prompt, **{"max_tokens": 200, "temperature": 1.0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def is_idle(self) -> bool:
        """Nothing runs, and every page has come back; waits for it."""
        engine = self.service.engine
        assert engine is not None
        end = time.monotonic() + 10
        while time.monotonic() < end:
            stats = engine.stats()
            if not stats.num_running and not stats.num_waiting and not stats.kv_usage:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def serve(folder: Path | None = None, **options: Any) -> Iterator[Live]:
    """The demo model or another, as it is, with options of the server."""
    model = folder or real_model("demo")
    assert model is not None, "the demo model is part of the repository"
    values: dict[str, Any] = {
        "model": str(model), "served_model_names": ("demo",), "preset": "none", "device": "cpu", "threads": 1,
        "kv_memory": 8 * 1024**2, "max_num_seqs": 16, "drain_timeout_s": 1, **options,
    }  # fmt: skip
    service = Service(ServerConfig(**values))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    live = Live(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        while service.engine is None:
            assert service.status().error is None, service.status().error
            assert thread.is_alive()
            time.sleep(0.02)
        yield live
    finally:
        server.should_exit = True
        thread.join(60)  # a busy machine
        assert not thread.is_alive()
