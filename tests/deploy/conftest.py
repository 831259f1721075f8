"""One Prometheus over a real server with some traffic, and over a page of vLLM as once read, for all tests here."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.prometheus import NoPrometheus, Prometheus, Series, find_binary, watch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "server"))  # for `live`

PROMPT = (
    "The captain looked at the sea and at the sky, went down to his men, sat at their table, and after a time he said"
)
MOST = 8  # requests at once, more than there is room for
WAIT_S = 180.0  # on a busy machine; a scrape fails where it takes more than its second, and the next one comes
# All that the tests ask about has been scraped: both servers, finished answers, refusals, and tokens by the second.
SEEN = (
    'sum(up{job=~"spq|gptq"}) == 2',
    'vllm:request_success_total{job="spq", finished_reason="length"} >= 4',
    'sum(http_requests_total{job="spq", status="503"}) > 0',
    'rate(vllm:generation_tokens_total{job="spq"}[1m]) > 0',
)


@dataclass(frozen=True, slots=True)
class Watched:
    """What every test here reads."""

    prometheus: Prometheus
    page: str  # our /metrics, after the traffic

    def ask(self, expr: str, count: int = 1) -> list[Series]:
        """What a query gives, once it has so many series: a scrape that fails takes those of its target away."""
        found: list[Series] = []

        def enough() -> bool:
            found[:] = self.prometheus.query(expr)
            return len(found) >= count

        wait_until(enough, expr)
        return found


class Page(BaseHTTPRequestHandler):
    """Sends a text on every path."""

    def __init__(self, *arguments: object, text: bytes) -> None:
        self._text = text
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(self._text)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture(scope="session")
def promtool() -> Path:
    """The linter and test runner, or a skip."""
    return binary("promtool")


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Both servers scraped each second, ours under load and with refusals."""
    binary("prometheus")
    import httpx
    from live import serve
    from models import real_model

    from spq.manifest import ModulePlan
    from tests.packed import write_packed

    folder = tmp_path_factory.mktemp("watched")
    demo = real_model("demo")
    assert demo is not None
    model = write_packed(demo, folder / "model", lambda name, shape: ModulePlan(kind="int8", shape=shape))
    vllm = ThreadingHTTPServer(("127.0.0.1", 0), partial(Page, text=(HERE / "vllm_metrics.txt").read_bytes()))
    threading.Thread(target=vllm.serve_forever, daemon=True).start()
    with serve(model, max_num_seqs=2, max_queue=1) as live:
        targets = {"spq": [live.url.removeprefix("http://")], "gptq": [f"127.0.0.1:{vllm.server_port}"]}
        with watch(targets, folder) as prometheus, ThreadPoolExecutor(MOST) as pool:

            def seen() -> bool:
                body = {"prompt": PROMPT, "max_tokens": 64, "ignore_eos": True}
                statuses = list(pool.map(lambda _: live.post("/v1/completions", **body).status_code, range(MOST)))
                assert 200 in statuses and set(statuses) <= {200, 503}, statuses
                return all(prometheus.query(expr) for expr in SEEN)

            wait_until(seen, "Prometheus has seen the servers and their load")
            yield Watched(prometheus, httpx.get(f"{live.url}/metrics").text)
    vllm.shutdown()


def binary(name: str) -> Path:
    try:
        return find_binary(name)
    except NoPrometheus as error:
        pytest.skip(str(error))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Ask until it holds."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"not within {WAIT_S} s: {what}"
        time.sleep(0.2)
