"""The parameters beyond OpenAI's own on a real model, through the official client and a real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from models import real_model
from program import Server, end, start

PROMPT = "It was a cold and rainy night, and the captain of the ship looked at the sea"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = real_model("demo")
    assert model is not None
    running = start(
        model, tmp_path_factory.mktemp("cache"), "--served-model-name", "demo", "--preset", "int8",
        "--kv-memory", "4MiB", "--scheduling-policy", "priority", "--trust-request-chat-template", "on",
    )  # fmt: skip
    yield running
    status, log = end(running)
    assert status == 0, log
    assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    known = {k: options.pop(k) for k in ("n", "logprobs", "echo", "stop", "seed") if k in options}
    arguments = {"max_tokens": 12, "temperature": 0.0, **known}
    arguments |= {k: options.pop(k) for k in ("max_tokens", "temperature") if k in options}
    return client.completions.create(model="demo", prompt=prompt, extra_body=options, **arguments)


def test_prompt_scores_equal_those_of_the_echo(client: openai.OpenAI) -> None:
    answer = complete(client, prompt_logprobs=2, return_token_ids=True, max_tokens=1).choices[0]
    echo = complete(client, echo=True, logprobs=2, max_tokens=0).choices[0].logprobs
    assert answer.prompt_logprobs[0] is None
    ids = answer.prompt_token_ids
    assert len(ids) == len(answer.prompt_logprobs) == len(echo.tokens)
    for token_id, place, value in zip(ids[1:], answer.prompt_logprobs[1:], echo.token_logprobs[1:], strict=True):
        assert place[str(token_id)]["logprob"] == pytest.approx(value, abs=1e-4)
        assert sorted(entry["rank"] for entry in place.values())[:2] == [1, 2]


def test_named_tokens_are_scored_like_the_best(client: openai.OpenAI) -> None:
    best = complete(client, logprobs=3, max_tokens=1, return_tokens_as_token_ids=True).choices[0].logprobs.top_logprobs
    ids = [int(label.removeprefix("token_id:")) for label in best[0]]
    named = complete(
        client, logprobs=0, max_tokens=1, logprob_token_ids=ids[::-1], return_tokens_as_token_ids=True
    ).choices[0].logprobs.top_logprobs  # fmt: skip
    assert list(named[0]) == list(best[0])[::-1]
    assert named[0] == pytest.approx(best[0], abs=1e-4)


def test_allowed_tokens_and_bad_words_shape_the_text(client: openai.OpenAI) -> None:
    plain = complete(client, return_token_ids=True).choices[0]
    allowed = sorted(set(plain.token_ids[:3]))
    bound = complete(client, return_token_ids=True, allowed_token_ids=allowed, ignore_eos=True, temperature=1.0, seed=1)
    assert set(bound.choices[0].token_ids) <= set(allowed)
    word = re.findall(r" (\w{3,})", plain.text)[0]
    assert f" {word}" not in complete(client, bad_words=[word]).choices[0].text


def test_token_ids_spell_the_text(client: openai.OpenAI) -> None:
    answer = complete(client, return_token_ids=True, n=2, seed=3, temperature=1.0)
    for choice in answer.choices:
        again = complete(client, [*choice.prompt_token_ids, *choice.token_ids], echo=True, max_tokens=0).choices[0]
        assert again.text.endswith(choice.text)


def test_an_included_stop_string(client: openai.OpenAI) -> None:
    plain = complete(client).choices[0].text
    stop = plain[5:9]
    answer = complete(client, stop=stop, include_stop_str_in_output=True).choices[0]
    assert answer.text == plain[: plain.index(stop) + len(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_a_salt_keeps_prefixes_apart(client: openai.OpenAI) -> None:
    def cached(salt: str | None) -> int:
        prompt = "A prompt that no other test has, long enough for a page of the cache to be full. " * 2
        return int(complete(client, prompt, max_tokens=1, cache_salt=salt).usage.prompt_tokens_details.cached_tokens)

    assert (cached("a"), cached("b"), cached(None)) == (0, 0, 0)
    assert cached("a") > 0 and cached("b") > 0 and cached(None) > 0


def test_truncation_equals_sending_less(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=1, return_token_ids=True).choices[0].prompt_token_ids
    cut = complete(client, truncate_prompt_tokens=6, return_token_ids=True).choices[0]
    assert cut.prompt_token_ids == whole[-6:]
    assert cut.text == complete(client, whole[-6:]).choices[0].text


def test_priority_is_taken(client: openai.OpenAI) -> None:
    assert complete(client, priority=5).choices[0].text == complete(client, priority=-5).choices[0].text


def test_scoring_alone_generates_nothing(client: openai.OpenAI) -> None:
    answer = complete(client, echo=True, max_tokens=0, logprobs=1)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == (PROMPT, 0)
    values = answer.choices[0].logprobs.token_logprobs
    assert values[0] is None and all(-40 < value < 0 for value in values[1:])


def test_a_batch_of_prompts_up_to_the_limit(client: openai.OpenAI) -> None:
    answer = complete(client, [f"Number {i}" for i in range(128)], max_tokens=2)
    assert [choice.index for choice in answer.choices] == list(range(128))
    assert answer.choices[7].text == complete(client, "Number 7", max_tokens=2).choices[0].text
    with pytest.raises(openai.BadRequestError, match="128 a request"):
        complete(client, ["x"] * 129)


def test_a_template_of_the_request(client: openai.OpenAI) -> None:
    template = "{{ bos_token }}{{ start }}{% for m in messages %}{{ m.content }}{% endfor %}"
    options = {"chat_template": template, "chat_template_kwargs": {"start": "Once upon "}, "return_token_ids": True}
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "the sea"}], max_tokens=8, extra_body=options
    )
    text = complete(client, "Once upon the sea", max_tokens=8, return_token_ids=True).choices[0]
    assert answer.prompt_token_ids == text.prompt_token_ids  # type: ignore[attr-defined]


def test_embeddings_of_like_texts_are_near(client: openai.OpenAI) -> None:
    texts = ["The captain looked at the sea.", "The captain looked at the ocean.", "Numbers: 7 19 4 88 23 5"]
    answer = client.embeddings.create(model="demo", input=texts)
    a, b, c = (item.embedding for item in answer.data)
    assert sum(x * x for x in a) == pytest.approx(1, abs=1e-5)

    def cosine(left: list[float], right: list[float]) -> float:
        return sum(x * y for x, y in zip(left, right, strict=True))

    assert cosine(a, b) > cosine(a, c)
    alone = client.embeddings.create(model="demo", input=texts[0], encoding_format="float").data[0].embedding
    assert alone == pytest.approx(a, abs=1e-5)
