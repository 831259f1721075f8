"""The page while the server starts and when it is gone: the real service and app, whose start waits at two gates."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from models import REPOSITORY
from playwright.sync_api import expect

from server import startup
from server.app import create_app
from server.config import ServerConfig
from server.service import Service


class Gated:
    """A server whose start stops while downloading and while compressing until it is let through."""

    def __init__(self, cache: Path, port: int) -> None:
        self.downloaded, self.compressed = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        config = ServerConfig(
            model=str(REPOSITORY / "demo" / "storyteller"), cache_dir=cache, preset="int8", kv_memory=2**20, threads=1,
            served_model_names=("storyteller",), drain_timeout_s=1,
        )  # fmt: skip
        app = create_app(Service(config))
        options = uvicorn.Config(app, port=port, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(options)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self.url = f"http://127.0.0.1:{port}"

    def start_up(self, config: Any, report: Any, *, on_step: Any) -> Any:
        report("downloading", 0.25, "model.safetensors, 1.2 of 4.8 GiB", 42.0)
        self.downloaded.wait()
        if self.failure is not None:
            raise self.failure
        report("compressing", 0.5, "layer 3 of 6", 8.0)
        self.compressed.wait()
        return REAL(config, report, on_step=on_step)

    def open(self) -> None:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.downloaded.set()
        self.compressed.set()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


REAL = startup.start_up


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> Iterator[Gated]:
    server = Gated(tmp_path, port)
    monkeypatch.setattr(startup, "start_up", server.start_up)
    server.open()
    yield server
    server.close()


def test_phases_are_followed_through_reloads_until_an_answer(gated: Gated, visit: Any) -> None:
    page = visit(gated.url).page
    card = page.locator("#start")
    expect(card.locator("h2")).to_have_text("Downloading the model")
    expect(card).to_contain_text("model.safetensors, 1.2 of 4.8 GiB")
    expect(card).to_contain_text("25 %, about 42 s left")
    assert float(card.locator("progress").get_attribute("value")) == 0.25
    expect(page.locator("#state")).to_have_text("Downloading the model 25 %")
    assert page.title().startswith("25 %")
    gated.downloaded.set()
    expect(card.locator("h2")).to_have_text("Compressing the model")
    page.reload()
    expect(card.locator("h2")).to_have_text("Compressing the model")
    expect(card.locator(".done").last).to_contain_text("Downloading the model")
    page.fill("#prompt", "It was a cold and rainy night, and")
    page.press("#prompt", "Enter")
    expect(page.locator("#send")).to_be_disabled()
    expect(page.locator(".message")).to_have_count(0)
    gated.compressed.set()
    page.wait_for_selector("#state[data-kind=ready]", timeout=120_000)
    expect(card).to_be_hidden()
    expect(page.locator("#prompt")).to_have_value("It was a cold and rainy night, and")
    page.click("#tab-settings")
    page.fill("#set-max_tokens", "8")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".assistant .text")
    page.wait_for_selector("#send:not([hidden])")
    expect(page.locator(".assistant .under-message")).to_contain_text("8 tokens")
    # the server goes: the conversation stays, and so does what is typed
    gated.close()
    expect(page.locator("#state")).to_have_text("No answer")
    expect(card).to_contain_text("This server does not answer")
    expect(card).to_be_in_viewport()
    expect(page.locator(".message")).to_have_count(2)
    page.fill("#prompt", "Still there?")
    expect(page.locator("#send")).to_be_disabled()
    expect(page.locator("#server [data-value=rate]")).to_have_text("–")


def test_a_start_that_fails_says_why(gated: Gated, visit: Any) -> None:
    page = visit(gated.url).page
    expect(page.locator("#start h2")).to_have_text("Downloading the model")
    gated.failure = startup.StartUpError("the folder has no config.json")
    gated.downloaded.set()
    expect(page.locator("#start h2")).to_have_text("The model cannot be served")
    expect(page.locator("#start")).to_contain_text("the folder has no config.json")
    expect(page.locator("#state")).to_have_text("The model cannot be served")
