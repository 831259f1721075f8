"""/v1/embeddings: shapes, limits, encodings, refusals, accounting; the fake engine's sums are [1, 2, 2, index]."""

from __future__ import annotations

import base64
import struct
from typing import Any

import openai
import pytest

from server.api.embeddings import mean_vector
from server.errors import EngineError, Overloaded


def embed(bench: Any, **body: Any) -> Any:
    return bench.post("/v1/embeddings", {"model": "tiny", "input": "say", **body})


def test_shape(bench: Any) -> None:
    body = embed(bench, input=["ab", "c"]).json()
    assert set(body) == {"object", "data", "model", "usage"}
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert [(d["object"], d["index"]) for d in body["data"]] == [("embedding", 0), ("embedding", 1)]
    assert body["data"][0]["embedding"] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 0])
    assert body["data"][1]["embedding"] == pytest.approx([x / 10**0.5 for x in (1, 2, 2, 1)])
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert bench.params().pools and bench.params().max_tokens == 0


def test_length_may_be_kept(bench: Any) -> None:
    assert embed(bench, use_activation=False).json()["data"][0]["embedding"] == [1, 2, 2, 0]


def test_base64_is_little_endian_float32(bench: Any) -> None:
    [item] = embed(bench, encoding_format="base64").json()["data"]
    assert struct.unpack("<4f", base64.b64decode(item["embedding"])) == pytest.approx([1 / 3, 2 / 3, 2 / 3, 0])


@pytest.mark.parametrize(
    ("given", "ids"),
    [("ab", [[97, 98]]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), (["a", [5]], [[97], [5]])],
)
def test_forms_of_the_input(bench: Any, given: Any, ids: list[list[int]]) -> None:
    assert embed(bench, input=given).status_code == 200
    assert [request.prompt_ids for request in bench.engine.requests] == ids


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [258]}, "input"),
        ({"input": None}, "input"),
        ({"input": ["a"] * 129}, "input"),
        ({"input": "x" * 201}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 3}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"priority": 1}, "priority"),
        ({"stream": True}, "stream"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_refusals(bench: Any, change: dict[str, Any], param: str) -> None:
    response = embed(bench, **change)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert bench.engine.requests == []


def test_the_context_may_be_filled_and_long_texts_cut(bench: Any) -> None:
    assert embed(bench, input="x" * 200).json()["usage"]["prompt_tokens"] == 200
    assert embed(bench, input="x" * 300, truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == 200
    assert embed(bench, input="abc", truncate_prompt_tokens=2, truncation_side="right").status_code == 200
    assert bench.engine.requests[-1].prompt_ids == [97, 98]
    assert embed(bench, dimensions=4).status_code == 200


def test_tokens_are_counted_once_and_failures_pass_on(bench: Any) -> None:
    embed(bench, input=["ab", "c"])
    assert bench.metric("vllm:prompt_tokens_total") == 3
    assert bench.metric("vllm:request_success_total", finished_reason="stop") == 2
    bench.script.error = EngineError("broke")
    assert embed(bench).status_code == 500
    assert bench.metric("vllm:request_success_total", finished_reason="abort") == 1
    bench.script.refuse = Overloaded("full", retry_after_s=3)
    assert embed(bench).headers["retry-after"] == "3"
    assert not bench.engine.live


def test_states_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(EngineError):
        mean_vector([1.0, float("nan")], 1, unit=True)
    with pytest.raises(EngineError):
        mean_vector([1.0, float("inf")], 1, unit=False)
    assert mean_vector([0.0, 0.0], 2, unit=True) == [0.0, 0.0]


def test_the_official_client(bench: Any, serve: Any) -> None:
    with openai.OpenAI(base_url=f"http://{serve(bench)}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=["a", "b"])
        assert [len(item.embedding) for item in answer.data] == [4, 4]
        assert answer.data[0].embedding == pytest.approx([1 / 3, 2 / 3, 2 / 3, 0])
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="tiny", input="a", dimensions=2)
        assert caught.value.param == "dimensions"
