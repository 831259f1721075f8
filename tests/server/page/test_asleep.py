"""The page of a server whose model sleeps: it says so, wakes nobody by looking, and takes messages."""

from __future__ import annotations

from typing import Any

from live import serve
from playwright.sync_api import expect

from server import startup


def test_a_sleeping_model_is_shown_and_woken_by_a_message(visit: Any, monkeypatch: Any) -> None:
    loads = []
    real = startup.start_up

    def start_up(*arguments: Any, **options: Any) -> Any:
        loads.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(startup, "start_up", start_up)
    with serve(admin_key="operator", sleep_idle_s=3600) as live:
        live.admin("sleep")
        page = visit(live.url).page
        expect(page.locator("#state")).to_have_text("Asleep")
        expect(page.locator("#start")).to_be_hidden()
        expect(page.locator("#welcome-facts")).to_contain_text("tokens of context")
        expect(page.locator("#memory")).to_have_text("None while the model sleeps")
        page.wait_for_timeout(3000)  # it looks every 2.5 s
        assert len(loads) == 1 and live.phase() == "sleeping"
        page.click("#tab-settings")
        page.fill("#set-max_tokens", "8")
        page.fill("#prompt", "It was a cold and rainy night, and")
        expect(page.locator("#send")).to_be_enabled()
        page.press("#prompt", "Enter")
        page.wait_for_selector("#send:not([hidden])")
        expect(page.locator(".assistant .under-message")).to_contain_text("8 tokens")
        expect(page.locator("#state")).to_have_text("Ready")
        assert len(loads) == 2
        live.admin("drain")
        expect(page.locator("#state")).to_have_text("Drained")
        expect(page.locator("#start")).to_contain_text("The operator has taken the model away")
        page.fill("#prompt", "Still there?")
        expect(page.locator("#send")).to_be_disabled()
