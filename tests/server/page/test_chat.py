"""A person at the page of a real server: types, reads, stops, is refused, gives a key. Headless Chromium."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest
from live import serve
from playwright.sync_api import expect

from server.engine.runner import ModelRunner

KEY = {"Authorization": "Bearer test-key"}
PROMPT = "It was a cold and rainy night, and"


def say(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def done(page: Any) -> None:
    page.wait_for_selector("#send:not([hidden])")


def written(page: Any) -> None:
    """Wait for the first words of an answer. (The policy of the page forbids the driver's wait_for_function.)"""
    expect(page.locator(".assistant .text").last).to_have_text(re.compile(".{20}", re.S))


def fulfil(answer: dict[str, str], route: Any) -> None:
    route.fulfill(**answer)


def settle(page: Any, **values: str) -> None:
    """Fill settings in; the panel need not be seen for it."""
    page.click("#tab-settings")
    for name, value in values.items():
        page.fill(f"#settings [name={name}]", value)
    page.click("#tab-server")


def test_an_answer_is_streamed_and_counted(chat: Any, demo: Any) -> None:
    watched = chat()
    page = watched.page
    settle(page, seed="7", temperature="0.7", max_tokens="400")
    before = demo.metric("vllm:generation_tokens_total")
    say(page, PROMPT)
    answer = page.locator(".message.assistant .text")
    written(page)
    half = answer.inner_text()
    assert page.locator("#stop").is_visible(), "the text is seen before the answer is complete"
    done(page)
    whole = answer.inner_text()
    assert len(whole) > len(half) and whole.startswith(half[:20])
    number = int(re.search(r"([\d,]+) tokens? ·", page.locator(".assistant .under-message").inner_text())[1])  # type: ignore[index]
    assert number == demo.metric("vllm:generation_tokens_total") - before
    assert re.search(r"tokens/s · first after [\d.]+ m?s", page.locator(".assistant .under-message").inner_text())
    expect(page.locator("#spoken")).to_contain_text("Answer finished")
    expect(page.locator("#context")).to_have_text(re.compile(r"^\d+ of 1,024 tokens of context$"))
    expect(page.locator("#server [data-value=generated]")).to_have_text(f"{int(before) + number:,}")
    assert watched.console == []


def test_the_same_text_as_the_api_gives(chat: Any, demo: Any) -> None:
    page = chat().page
    settle(page, seed="11", temperature="0.8", max_tokens="24", system="You tell stories.")
    with page.expect_request("**/v1/chat/completions") as seen:
        say(page, PROMPT)
    done(page)
    body = seen.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "You tell stories."}
    assert {name: body[name] for name in ("seed", "temperature", "max_tokens")} == {
        "seed": 11, "temperature": 0.8, "max_tokens": 24}  # fmt: skip
    assert "top_p" not in body, "an empty field is not sent"
    plain = {**body, "stream": False}
    del plain["stream_options"]
    answer = httpx.post(f"{demo.url}/v1/chat/completions", json=plain, headers=KEY, timeout=60).json()
    expected = answer["choices"][0]["message"]["content"].strip()
    assert " ".join(page.locator(".assistant .text").inner_text().split()) == " ".join(expected.split())


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_frees_the_server_and_keeps_the_text(chat: Any, demo: Any, eventually: Any, way: str) -> None:
    page = chat().page
    settle(page, seed="3", temperature="0.7", max_tokens="1000")
    say(page, PROMPT)
    written(page)
    assert demo.metric("vllm:num_requests_running") == 1
    if way == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    done(page)
    eventually(lambda: demo.metric("vllm:num_requests_running") == 0)
    expect(page.locator(".assistant .cut")).to_have_text("stopped")
    assert len(page.locator(".assistant .text").inner_text()) > 20
    expect(page.locator("#prompt")).to_be_focused()
    page.get_by_title("Answer again").click()
    written(page)
    assert page.locator(".message").count() == 2, "the new answer takes the old one's place"
    page.keyboard.press("Escape")
    done(page)


def test_a_conversation_outlives_a_reload_and_a_new_one_is_empty(chat: Any) -> None:
    page = chat().page
    settle(page, seed="5", max_tokens="8")
    say(page, PROMPT)
    done(page)
    text = page.locator(".assistant .text").inner_text()
    page.reload()
    expect(page.locator(".assistant .text")).to_have_text(text)
    page.wait_for_selector("#state[data-kind=ready]")
    assert page.locator("#settings [name=seed]").input_value() == "5"
    with page.expect_request("**/v1/chat/completions") as seen:
        say(page, "And then?")
    assert [message["role"] for message in seen.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    done(page)
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    page.reload()
    expect(page.locator(".message")).to_have_count(0)


def test_the_words_of_a_model_are_text(chat: Any) -> None:
    """The demo model does not write markup, so here the answer alone is not the server's."""
    page = chat().page
    nasty = "<img src=x onerror=\"document.title='owned'\">\n\n```html\n<b>bold</b>\n```\n<script>1</script> & so on"
    pieces = [nasty[i : i + 3] for i in range(0, len(nasty), 3)]
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", partial(fulfil, {"content_type": "text/event-stream", "body": events}))
    say(page, nasty)
    done(page)
    for box in (page.locator(".user .text"), page.locator(".assistant .text")):
        assert box.locator("img, script, b").count() == 0
        expect(box.locator("p").first).to_have_text("<img src=x onerror=\"document.title='owned'\">")
        expect(box.locator("pre code")).to_have_text("<b>bold</b>")
        expect(box.locator("p").last).to_have_text("<script>1</script> & so on")
    outcome = "() => { try { document.body.innerHTML = '<i>x</i>'; return 'done' } catch (e) { return e.name } }"
    assert page.evaluate(outcome) == "TypeError", "Trusted Types stop even a mistake of ours"
    assert "owned" not in page.title()


def test_a_stream_that_breaks_keeps_what_came(chat: Any) -> None:
    page = chat().page
    begun = 'data: {"choices": [{"index": 0, "delta": {"content": "Half an"}}]}\n\n'
    failed = 'data: {"error": {"message": "a step failed", "type": "server_error", "param": null, "code": "x"}}\n\n'
    for body, reason in ((begun, "The connection ended before the answer did."), (begun + failed, "a step failed")):
        answer = {"content_type": "text/event-stream", "body": body}
        page.route("**/v1/chat/completions", partial(fulfil, answer))
        say(page, "Go on")
        expect(page.locator("#problem")).to_contain_text(reason)
        expect(page.locator(".assistant .text").last).to_have_text("Half an")
        expect(page.locator(".assistant .cut").last).to_have_text(reason)
        page.unroute("**/v1/chat/completions")


def test_a_full_queue_is_said_with_the_time_to_wait(visit: Any, eventually: Any, monkeypatch: Any) -> None:
    """The engine stands still until the page has said it: on a machine of any speed, two others fill the server."""
    go_on = threading.Event()
    launch = ModelRunner.launch

    def held(runner: ModelRunner, *arguments: Any) -> Any:
        assert go_on.wait(120)
        return launch(runner, *arguments)

    with serve(max_num_seqs=1, max_queue=1) as live, ThreadPoolExecutor(2) as others:
        page = visit(live.url).page
        page.wait_for_selector("#state[data-kind=ready]")
        settle(page, max_tokens="4", seed="1")
        monkeypatch.setattr(ModelRunner, "launch", held)
        try:
            taken = [others.submit(live.complete, PROMPT, max_tokens=4, ignore_eos=True) for _ in range(2)]
            eventually(lambda: live.metric("vllm:num_requests_running") == 1)
            eventually(lambda: live.metric("vllm:num_requests_waiting") == 1)
            say(page, "May I come in?")
            expect(page.locator("#problem")).to_contain_text("queue")
            expect(page.locator("#problem")).to_contain_text(re.compile(r"Try again (in \d+ s|now)\."))
            expect(page.locator("#prompt")).to_have_value("May I come in?")
            expect(page.locator(".message")).to_have_count(0)
        finally:
            go_on.set()
        assert all(answer.result()["finish_reason"] == "length" for answer in taken)
        page.press("#prompt", "Enter")
        expect(page.locator("#problem")).to_be_hidden()
        page.wait_for_selector(".assistant .text")
        done(page)
        expect(page.locator(".message")).to_have_count(2)


def test_a_refusal_is_shown_with_its_message_and_setting(chat: Any) -> None:
    page = chat().page
    settle(page, max_tokens="5000")
    say(page, PROMPT)
    expect(page.locator("#problem")).to_contain_text("maximum context length is 1024 tokens")
    page.get_by_role("button", name="Open the setting").click()
    field = page.locator("#set-max_tokens")
    expect(field).to_be_focused()
    expect(field).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Control+A")
    page.keyboard.type("4")
    expect(field).not_to_have_attribute("aria-invalid", "true")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".assistant .text")
    done(page)
    expect(page.locator("#problem")).to_be_hidden()


@pytest.mark.parametrize(("name", "value"), [("temperature", "2.5"), ("top_k", "1.5"), ("seed", "x"), ("top_p", "0")])
def test_a_setting_outside_its_limits_is_not_sent(chat: Any, name: str, value: str) -> None:
    page = chat().page
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    settle(page, **{name: value})
    say(page, PROMPT)
    expect(page.locator(f"#set-{name}")).to_be_focused()
    assert page.locator(f"#wrong-{name}").inner_text()
    expect(page.locator("#prompt")).to_have_value(PROMPT)
    assert sent == []


def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(visit: Any, demo: Any) -> None:
    page = visit(demo.url).page
    expect(page.locator("#key-label")).to_have_text("This server asks for an API key.")
    expect(page.locator("#server [data-value=running]")).to_have_text("0")  # numbers need none
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    expect(page.locator("#key-label")).to_have_text("The server does not know this key.")
    page.fill("#key", "test-key")
    page.press("#key", "Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#facts")).to_contain_text("1,024 tokens")
    assert page.evaluate("[sessionStorage['spq.key'], JSON.stringify(localStorage).includes('test-key')]") == [
        '"test-key"', False]  # fmt: skip
    settle(page, max_tokens="4")
    say(page, PROMPT)
    page.wait_for_selector(".assistant .text")
    done(page)
    page.click("#tab-code")
    lines = page.locator("#snippets").inner_text()
    assert "test-key" not in lines and "$SPQ_API_KEY" in lines and 'os.environ["SPQ_API_KEY"]' in lines
    page.click("#tab-settings")
    page.click("#forget")
    say(page, PROMPT)
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("#prompt")).to_have_value(PROMPT)


def test_the_lines_to_copy_run(chat: Any, demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python lines are run as they stand; the settings that OpenAI's client does not know are among them."""
    page = chat().page
    settle(page, max_tokens="6", seed="2", top_k="5", stops='"\n]', system="It's a [ test ]")
    page.click("#tab-code")
    shell, python, _ = page.locator("#snippets pre").all_inner_texts()
    body = json.loads(re.search(r"-d '(.*)'$", shell, re.S)[1].replace("'\\''", "'"))  # type: ignore[index]
    assert (body["max_tokens"], body["top_k"], body["stop"]) == (6, 5, ['"', "]"])
    assert body["messages"][0]["content"] == "It's a [ test ]"
    said: list[str] = []
    monkeypatch.setenv("SPQ_API_KEY", "test-key")
    exec(python, {"print": lambda text, **_: said.append(text)})
    answer = httpx.post(f"{demo.url}/v1/chat/completions", json={**body, "stream": False}, headers=KEY, timeout=60)
    assert "".join(said) == answer.json()["choices"][0]["message"]["content"]
