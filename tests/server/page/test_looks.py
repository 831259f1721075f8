"""Widths, colours, motion and the keyboard, in headless Chromium at a real server."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

VIEWS = ("chat", "server", "settings", "code")
PAIRS = (("ink", "ground"), ("ink", "raised"), ("ink", "wash"), ("soft", "ground"), ("soft", "raised"),
         ("soft", "field"), ("soft", "wash"), ("accent", "ground"), ("on-accent", "accent"), ("bad", "bad-wash"),
         ("bad", "raised"), ("warn", "ground"), ("warn", "raised"))  # fmt: skip


@pytest.mark.parametrize("width", [320, 390, 900, 1280])
def test_nothing_is_wider_than_the_window(chat: Any, width: int) -> None:
    page = chat(viewport={"width": width, "height": 780}).page
    narrow = width < 896  # 56rem
    page.click("#tab-settings")
    page.fill("#set-max_tokens", "3")
    if narrow:
        page.click("#tab-chat")
    page.fill("#prompt", "W" * 300 + "\n```\n" + "x" * 300 + "\n```")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".assistant .text")
    page.wait_for_selector("#send:not([hidden])")
    for view in VIEWS if narrow else VIEWS[1:]:
        page.click(f"#tab-{view}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        wide = page.evaluate(
            """width => [...document.querySelectorAll('body *')]
            .filter(e => e.checkVisibility() && !e.closest('pre, .unseen, .skip'))
            .filter(e => e.getBoundingClientRect().right > width + 1).map(e => e.id || e.className || e.tagName)""",
            width,
        )
        assert wide == [], view
    assert page.locator("#chat").is_visible() == (not narrow), "narrow windows show one view at a time"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_are_legible(chat: Any, scheme: str) -> None:
    page = chat(color_scheme=scheme).page
    colours = page.evaluate(
        """names => Object.fromEntries(names.map(name => {
            const probe = document.createElement('p');
            probe.style.color = `var(--${name})`;
            document.body.append(probe);
            const rgb = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
            probe.remove();
            return [name, rgb];
        }))""",
        sorted({name for pair in PAIRS for name in pair}),
    )
    assert (luminance(colours["ground"]) < 0.05) == (scheme == "dark")
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in PAIRS}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}, "WCAG AA asks for 4.5"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert ground == colours["ground"]


def luminance(rgb: list[int]) -> float:
    """WCAG 2.2's relative luminance."""
    red, green, blue = (c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: list[int], other: list[int]) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("motion", "still"), [("reduce", True), ("no-preference", False)])
def test_motion_is_left_out_where_it_is_not_wanted(chat: Any, motion: str, still: bool) -> None:
    page = chat(reduced_motion=motion).page
    transition = page.evaluate("getComputedStyle(document.querySelector('#kv-bar')).transitionProperty")
    assert (transition == "none") == still


def test_the_keyboard_is_enough(chat: Any, demo: Any, eventually: Any) -> None:
    page = chat().page
    press, typed = page.keyboard.press, page.keyboard.type
    press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    typed("It was a cold and rainy night,")
    press("Shift+Enter")
    typed("and")
    assert page.locator("#prompt").input_value().count("\n") == 1
    press("Enter")
    expect(page.locator(".assistant .text")).to_have_text(re.compile(".{20}", re.S))
    press("Escape")
    eventually(lambda: demo.metric("vllm:num_requests_running") == 0)
    expect(page.locator("#prompt")).to_be_focused()
    # back to the tabs, then to a setting, and on to the model again
    while page.evaluate("document.activeElement.id") != "tab-server":
        press("Shift+Tab")
        assert page.evaluate("document.activeElement !== document.body"), "the tabs cannot be reached"
    press("ArrowRight")
    expect(page.locator("#tab-settings")).to_be_focused()
    expect(page.locator("#settings")).to_be_visible()
    while page.evaluate("document.activeElement.id") != "set-max_tokens":
        press("Tab")
        assert page.evaluate("document.activeElement !== document.body"), "the settings cannot be reached"
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        composer = page.evaluate("document.activeElement.id === 'prompt'")  # its frame is the form's
        assert outline != "none" or composer, "the focus cannot be seen"
    typed("5")
    while page.evaluate("document.activeElement.id") != "prompt":
        press("Shift+Tab")
    with page.expect_request("**/v1/chat/completions") as seen:
        typed("Go on.")
        press("Enter")
    assert seen.value.post_data_json["max_tokens"] == 5
    page.wait_for_selector("#send:not([hidden])")
    press("Tab")  # Send is not to be pressed without text: New chat comes next
    while page.evaluate("document.activeElement.id") != "new":
        press("Tab")
    press("Space")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#prompt")).to_be_focused()


def test_bars_and_figures_are_those_of_the_ledger(chat: Any, demo: Any) -> None:
    page = chat().page
    rows = page.locator("#memory tr")
    kinds = rows.evaluate_all("rows => rows.map(row => row.dataset.kind).filter(Boolean)")
    assert {"weights", "kv", "workspace", "other"} <= set(kinds)
    parts = page.locator("#memory-stack i")
    shares = parts.evaluate_all("parts => parts.map(part => parseFloat(part.style.getPropertyValue('--share')))")
    assert len(shares) == len(kinds) and sum(shares) == pytest.approx(100, abs=0.1)
    models = httpx.get(f"{demo.url}/v1/models", headers={"Authorization": "Bearer test-key"}).json()
    ledger = models["data"][0]["spq"]["memory_bytes"]
    weights = f"{ledger['weights'] / 1024**2:.2f} MiB"
    expect(page.locator("#memory tr[data-kind=weights] td").first).to_have_text(weights)
    assert demo.metric("spq:ready") == 1
