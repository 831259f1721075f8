"""Chromium at the page: the browser of the machine, a server process with the demo model, a page that is watched."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from models import REPOSITORY
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families

KEY = "test-key"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run")  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_S = 180.0  # torch takes a while to import on a busy machine
PATIENCE_MS = 20_000  # with what is to be seen in the page


@dataclass(slots=True)
class Demo:
    """A server process with the demo model. It asks for KEY, runs one sequence at a time and lets one wait."""

    url: str

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@dataclass  # without slots: the driver notes on the object which methods listen
class Watched:
    """A page and everything it did that it should not have done."""

    page: Page
    origin: str
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.console.append(message.text)

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.origin, "data:")):
            self.foreign.append(request.url)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def chromium_path() -> str:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium here")
    return path


@pytest.fixture(scope="session")
def demo(chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """No server starts where there is no browser."""
    port = free_port()
    command = [
        sys.executable, "-m", "server", "--model", "demo/storyteller", "--port", str(port), "--threads", "1",
        "--preset", "int8", "--api-key", KEY, "--max-num-seqs", "1", "--max-queue", "1", "--kv-memory", "1MiB",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPQ_")}
    environment |= {"SPQ_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=file)
    running = Demo(f"http://127.0.0.1:{port}")
    try:
        wait_for(lambda: process.poll() is not None or answers(f"{running.url}/ready"), START_S)
        assert process.poll() is None, log.read_text()
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert "Traceback" not in log.read_text()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.05)


@pytest.fixture
def eventually() -> Callable[..., None]:
    return wait_for


@pytest.fixture(scope="module")  # while it is there an event loop runs in this thread, which other tests must not meet
def browser(chromium_path: str) -> Iterator[Browser]:
    """The Chromium of the machine. Nothing is installed for these tests but a Python package that drives it."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=chromium_path, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Watched]]:
    """visit(url, key=..., **context) opens the page. What must never happen is checked at the end of each test."""
    opened: list[Watched] = []

    def visit(url: str, *, key: str | None = None, **options: Any) -> Watched:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(PATIENCE_MS)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('spq.key', '\"{key}\"')")
        watched = Watched(context.new_page(), url)
        opened.append(watched)
        watched.page.goto(f"{url}/")
        return watched

    yield visit
    for watched in opened:
        watched.page.context.close()
        assert watched.errors == [], "an exception in the page"
        assert watched.foreign == [], "the page asked somebody else"


@pytest.fixture
def chat(demo: Demo, visit: Callable[..., Watched]) -> Callable[..., Watched]:
    """The page of the demo server, with the key, ready to be talked to."""

    def open_it(**options: Any) -> Watched:
        watched = visit(demo.url, key=KEY, **options)
        watched.page.wait_for_selector("#state[data-kind=ready]")
        watched.page.wait_for_selector("#facts div", state="attached")
        return watched

    return open_it
