"""LangChain's own classes as the parser of what a real server sends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from langchain_core.tools import tool
from live import Live, serve
from pydantic import BaseModel, ConfigDict, Field

langchain_openai = pytest.importorskip("langchain_openai")

PROMPT = "The old man said"


class Trip(BaseModel):
    """Where to, and for how many."""

    model_config = ConfigDict(extra="forbid")

    to: Literal["Oslo", "Rome"]
    seats: Annotated[int, Field(ge=1, le=9)]


@tool
def book(to: Literal["Oslo", "Rome"], seats: Annotated[int, Field(ge=1, le=9)]) -> str:
    """Book seats."""
    return f"{seats} to {to}"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve() as running:
        yield running
        assert running.is_idle()


def chat(live: Live, **options: Any) -> Any:
    return langchain_openai.ChatOpenAI(
        model="demo", base_url=f"{live.url}/v1", api_key="none", max_retries=0,
        **{"max_tokens": 24, "temperature": 0, "seed": 1, **options},
    )  # fmt: skip


def test_invoke_counts_its_tokens(live: Live) -> None:
    answer = chat(live).invoke(PROMPT)
    assert answer.content and answer.response_metadata["model_name"] == "demo"
    assert answer.response_metadata["finish_reason"] == "length"
    usage = answer.usage_metadata
    assert usage["output_tokens"] == 24 and usage["total_tokens"] == usage["input_tokens"] + 24


def test_streams_equal_the_whole_answer(live: Live) -> None:
    model = chat(live, stream_usage=True)
    whole = model.invoke(PROMPT)

    async def collect() -> list[Any]:
        return [chunk async for chunk in model.astream(PROMPT)]

    for chunks in (list(model.stream(PROMPT)), asyncio.run(collect())):
        assert len(chunks) > 3
        total = chunks[0]
        for chunk in chunks[1:]:
            total += chunk
        assert total.content == whole.content
        assert total.usage_metadata == whole.usage_metadata
        assert total.response_metadata["finish_reason"] == "length"


def test_a_batch_equals_its_prompts_one_by_one(live: Live) -> None:
    model = chat(live)
    prompts = ["The sea", "A dark night", "Once"]
    assert [a.content for a in model.batch(prompts)] == [model.invoke(prompt).content for prompt in prompts]


def test_log_probabilities_spell_the_answer(live: Live) -> None:
    answer = chat(live, logprobs=True, top_logprobs=2).invoke(PROMPT)
    content = answer.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == answer.content
    assert all(entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"]) for entry in content)


@pytest.mark.parametrize("choice", ["any", "book"])
def test_bound_tools_are_called_and_run(live: Live, choice: str) -> None:
    model = chat(live, max_tokens=200).bind_tools([book], tool_choice=choice, parallel_tool_calls=False, strict=True)
    answer = model.invoke(PROMPT)
    assert answer.invalid_tool_calls == []
    [call] = answer.tool_calls
    assert call["name"] == "book" and call["id"]
    result = book.invoke(call)
    assert result.content == f"{call['args']['seats']} to {call['args']['to']}" and result.tool_call_id == call["id"]
    after = chat(live).invoke([("user", PROMPT), answer, result])  # a conversation may hold the call and its result
    assert after.content


def test_calls_arrive_in_chunks(live: Live) -> None:
    model = chat(live, max_tokens=200).bind_tools([book], tool_choice="book", strict=True)
    chunks = list(model.stream(PROMPT))
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert len(pieces) > 3 and [piece["name"] for piece in pieces if piece["name"]] == ["book"]
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.tool_calls == [{**model.invoke(PROMPT).tool_calls[0], "id": total.tool_calls[0]["id"]}]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_its_class(live: Live, method: str) -> None:
    for seed in range(3):
        model = chat(live, max_tokens=100, temperature=1.2, seed=seed).with_structured_output(Trip, method=method)
        assert isinstance(model.invoke(PROMPT), Trip)


def test_structured_output_streams(live: Live) -> None:
    model = chat(live, max_tokens=100).with_structured_output(Trip, method="json_schema")
    parts = list(model.stream(PROMPT))
    assert isinstance(parts[-1], Trip)


def test_json_mode_is_an_object(live: Live) -> None:
    """The model was not trained to end an object: where it did not within its tokens, the client says so."""
    objects = []
    for seed in range(4):
        model = chat(live, max_tokens=300, temperature=1.0, seed=seed, logit_bias=close_braces(live))
        with contextlib.suppress(openai.LengthFinishReasonError):
            objects.append(model.with_structured_output(None, method="json_mode").invoke(PROMPT))
    assert objects and all(isinstance(found, dict) for found in objects)


def close_braces(live: Live) -> dict[int, int]:
    [token] = live.post("/tokenize", prompt="}", add_special_tokens=False).json()["tokens"]
    return {token: 8}


def completion(live: Live, **options: Any) -> Any:
    return langchain_openai.OpenAI(
        model="demo", base_url=f"{live.url}/v1", api_key="none", max_retries=0, temperature=0, max_tokens=16, **options
    )


def test_completions(live: Live) -> None:
    model = completion(live)
    result = model.generate(["It was", "The sea"])
    texts = [generation[0].text for generation in result.generations]
    assert texts == [model.invoke(prompt) for prompt in ("It was", "The sea")]
    assert result.llm_output["token_usage"]["completion_tokens"] == 32
    assert "".join(model.stream("It was")) == texts[0]
    stop = texts[0][8:11]
    assert model.invoke("It was", stop=[stop]) == texts[0][: texts[0].index(stop)]


def embeddings(live: Live, **options: Any) -> Any:
    return langchain_openai.OpenAIEmbeddings(
        model="demo", base_url=f"{live.url}/v1", api_key="none", max_retries=0, **options
    )


def test_embeddings_of_texts(live: Live) -> None:
    model = embeddings(live, check_embedding_ctx_length=False)
    texts = ["a ship at sea", "the old house"]
    vectors = model.embed_documents(texts)
    assert model.embed_query(texts[0]) == pytest.approx(vectors[0], abs=1e-5)
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-4) and vectors[0] != vectors[1]


def test_embeddings_of_token_ids(live: Live) -> None:
    """With the model's own tokenizer it cuts long texts. Its default, tiktoken, has other ids, and downloads them."""
    folder = live.service.config.model
    model = embeddings(live, tiktoken_enabled=False, tiktoken_model_name=folder)
    plain = embeddings(live, check_embedding_ctx_length=False)
    assert model.embed_query("the old house") == pytest.approx(plain.embed_query("the old house"), abs=1e-4)
