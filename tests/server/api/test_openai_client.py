"""The official Python client, sync and async, against a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from server.errors import DeadlineExceeded, EngineError, Overloaded

MESSAGES: Any = [{"role": "user", "content": "say"}]


@pytest.fixture
def client(bench: Any, serve: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{serve(bench)}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "org/alias"]
    model = client.models.retrieve("org/alias")
    assert model.owned_by == "spq-serve"
    assert model.max_model_len == 200  # type: ignore[attr-defined]


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=1, stop=" world", max_tokens=50)
    assert [choice.text for choice in answer.choices] == ["hello"] * 4
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert "".join(answer.choices[0].logprobs.tokens) == "hello world"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens == 2 + 44


def test_completion_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="x", stream=True, stream_options={"include_usage": True}, logprobs=1
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "hello world"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        n=2,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
        seed=1,
        max_completion_tokens=5,
    )
    assert [choice.message.content for choice in answer.choices] == ["hello", "hello"]
    assert answer.choices[0].finish_reason == "length"
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == list("hello")
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 5
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, stream_options={"include_usage": True}, logprobs=True
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "hello world"
    assert final.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert final.usage.completion_tokens == 12


def test_async_client(bench: Any, serve: Any) -> None:
    base_url = f"http://{serve(bench)}/v1"

    async def talk() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

            async def streamed() -> str:
                text = ""
                async for chunk in await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
                    text += chunk.choices[0].delta.content or ""
                return text

            texts = await asyncio.gather(*(streamed() for _ in range(4)))
            plain = await client.completions.create(model="tiny", prompt=[1, 2, 3])
            return texts, plain.choices[0].text

    assert asyncio.run(talk()) == (["hello world"] * 4, "hello world")


def test_closing_the_stream_aborts(client: openai.OpenAI, bench: Any, eventually: Any) -> None:
    bench.script.text, bench.script.delay_s = "x" * 1000, 0.01
    stream = client.completions.create(model="tiny", prompt="x", stream=True, max_tokens=190)
    next(iter(stream))
    stream.close()
    assert eventually(lambda: not bench.engine.live)


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "param"),
    [
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"prompt": "x" * 300}, openai.BadRequestError, "context_length_exceeded", "prompt"),
        ({"suffix": "x"}, openai.BadRequestError, "unsupported_value", "suffix"),
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "model"),
    ],
)
def test_exceptions(
    client: openai.OpenAI, arguments: Any, kind: type[openai.APIStatusError], code: str, param: str
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", **arguments})
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.request_id


def test_wrong_key(make_bench: Any, serve: Any) -> None:
    address = serve(make_bench(api_keys=("right",)))
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert client.with_options(api_key="right").models.list().data


def test_server_errors(client: openai.OpenAI, bench: Any) -> None:
    bench.script.refuse = Overloaded("full", retry_after_s=1)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="x")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"


def test_client_retries_when_overloaded_but_not_after_a_deadline(bench: Any, serve: Any) -> None:
    address = serve(bench)
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=1) as client:
        bench.script.refuse = Overloaded("full", retry_after_s=1)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="x")
        assert bench.metric("vllm:admission_rejections_total") == 2
        bench.script.refuse, bench.script.error = None, DeadlineExceeded("late")
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="x")
        assert len(bench.engine.requests) == 1


def test_error_in_a_stream_raises(client: openai.OpenAI, bench: Any) -> None:
    bench.script.error, bench.script.fail_after = EngineError("the engine broke"), 2
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="the engine broke"):
        list(stream)
