"""Several keys: names, the key file, limits a minute, and what a refusal says."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.datastructures import Headers

from server.api import keys as keys_module
from server.api.keys import Key, KeyFileError, find_key, read_keys
from server.api.limits import Bucket
from server.config import ServerConfig


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def names(*api_keys: str, file: Path | None = None, **options: Any) -> dict[str, Key]:
    return {k.name: k for k in read_keys(ServerConfig(model="m", api_keys=api_keys, api_key_file=file, **options))}


@pytest.mark.parametrize(
    ("given", "name", "secret"),
    [
        ("alice=sk-1", "alice", "sk-1"),
        ("sk-1", "key-1", "sk-1"),
        ("c2VjcmV0LWtleQ==", "key-1", "c2VjcmV0LWtleQ=="),
        ("c2VjcmV0LWtleQ=", "key-1", "c2VjcmV0LWtleQ="),
        ("bob=c2Vj==", "bob", "c2Vj=="),
        ("with space=x", "key-1", "with space=x"),
    ],
)
def test_a_key_may_be_named(given: str, name: str, secret: str) -> None:
    found = names(given)
    assert set(found) == {name}
    assert find_key(list(found.values()), Headers({"Authorization": f"Bearer {secret}"})) is found[name]


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    secret = hashlib.sha256(b"two").hexdigest()
    path.write_text(f'[one]\nkey = "first"\ntokens_per_minute = 50\n[two]\nsha256 = "{secret}"\n')
    found = names("three=3", file=path, requests_per_minute=7, tokens_per_minute=9)
    assert {k: (v.requests_per_minute, v.tokens_per_minute) for k, v in found.items()} == {
        "three": (7, 9), "one": (7, 50), "two": (7, 9),
    }  # fmt: skip
    assert find_key(list(found.values()), Headers({"x-api-key": "two"})) is found["two"]
    assert find_key(list(found.values()), Headers({"Authorization": f"Bearer {secret}"})) is None, (
        "a digest opens nothing"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[one]\n", "one: Value error, give either key or sha256"),
        ('[one]\nkey = "a-secret"\nsha256 = "' + "0" * 64 + '"\n', "give either key or sha256"),
        ('[one]\nkey = "a-secret"\nrpm = 5\n', "one.rpm: Extra inputs are not permitted"),
        ('[one]\nkey = "a-secret"\ntokens_per_minute = 0\n', "one.tokens_per_minute"),
        ('[one]\nsha256 = "a-secret"\n', "one.sha256"),
        ('one = "a-secret"\n', "one is no table"),
        ("key = a-secret", "is no TOML"),
        ("", "holds no key"),
        ('[one]\nkey = "a-secret"\n[two]\nkey = "a-secret"\n', "one and two are the same"),
    ],
)
def test_a_wrong_key_file_is_refused_without_showing_a_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        names(file=path)
    assert message in str(caught.value) and "a-secret" not in str(caught.value)


def test_a_name_is_given_once() -> None:
    with pytest.raises(KeyFileError, match="two API keys have the name a"):
        names("a=1", "a=2")


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    class Fake:
        compare_digest = staticmethod(compare)

    keys = list(names("a=1", "b=2", "c=3").values())
    monkeypatch.setattr(keys_module, "hmac", Fake)
    assert find_key(keys, Headers({"Authorization": "Bearer 1"})) is keys[0]
    assert [b for _, b in compared] == [key.digest for key in keys], "also those behind the match"
    assert all(len(a) == len(b) == 32 for a, b in compared), "of equal length, whatever was sent"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_fills_evenly_and_may_owe() -> None:
    clock = Clock()
    bucket = Bucket(30, clock)
    assert bucket.wait_s() == 0
    bucket.take(30)
    assert (bucket.level(), bucket.wait_s()) == (0, 2)
    clock.now += 2
    assert bucket.wait_s() == 0
    bucket.take(91)
    assert (bucket.level(), bucket.wait_s()) == (-90, 182)
    clock.now += 1e6
    assert bucket.level() == 30, "no more than a minute's worth is saved up"


def test_requests_per_minute(make_bench: Any) -> None:
    bench = make_bench(api_keys=("alice=a", "bob=b"), requests_per_minute=2)
    body = {"model": "tiny", "prompt": "say"}
    answers = [bench.post("/v1/completions", body, headers=bearer("a")) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    error = answers[2].json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("rate_limit_exceeded", "requests", None)
    assert "alice" in error["message"] and 25 <= int(answers[2].headers["retry-after"]) <= 30
    assert bench.metric("vllm:admission_rejections_total", reason="rate_limit_exceeded") == 1
    assert bench.post("/v1/completions", body, headers=bearer("b")).status_code == 200, "bob has a limit of his own"
    assert bench.client.get("/v1/models", headers=bearer("a")).status_code == 200, "only POST counts"
    assert len(bench.engine.requests) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute(make_bench: Any, stream: bool) -> None:
    bench = make_bench(api_keys=("a",), tokens_per_minute=13)
    body = {"model": "tiny", "prompt": "say", "max_tokens": 8, "stream": stream}
    first = bench.post("/v1/completions", body, headers=bearer("a"))
    assert first.status_code == 200 and first.headers["x-ratelimit-limit-tokens"] == "13"
    second = bench.post("/v1/completions", body, headers=bearer("a"))
    assert second.status_code == 200, "2 were left, and nobody knows what an answer will cost"
    third = bench.post("/v1/completions", body, headers=bearer("a"))
    assert (third.status_code, third.json()["error"]["type"]) == (429, "tokens")
    assert 40 <= int(third.headers["retry-after"]) <= 47, "9 owed and one needed, at 13 a minute"


def test_embeddings_count_their_prompts(make_bench: Any) -> None:
    bench = make_bench(api_keys=("a",), tokens_per_minute=3)
    body = {"model": "tiny", "input": "say it"}
    assert bench.post("/v1/embeddings", body, headers=bearer("a")).status_code == 200
    assert bench.post("/v1/embeddings", body, headers=bearer("a")).status_code == 429


def test_the_tokens_of_a_stream_count_as_they_come(make_bench: Any, serve: Any) -> None:
    bench = make_bench(api_keys=("a",), tokens_per_minute=90)
    bench.script.text, bench.script.delay_s = "x" * 1000, 0.02
    body = {"model": "tiny", "prompt": "say", "max_tokens": 150, "stream": True}
    with httpx.Client(base_url=f"http://{serve(bench)}", headers=bearer("a"), timeout=10) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            num_tokens = 0
            for line in response.iter_lines():
                num_tokens += len(json.loads(line[6:])["choices"][0]["text"]) if line.startswith("data: {") else 0
                if num_tokens == 1:
                    assert client.post("/v1/completions", json={**body, "max_tokens": 1, "stream": False}).is_success
                if num_tokens == 110:
                    assert client.post("/v1/completions", json=body).status_code == 429, "the stream still runs"
                    break
        assert num_tokens == 110


def test_the_official_client_waits_and_tries_again(make_bench: Any, serve: Any) -> None:
    bench = make_bench(api_keys=("a",), requests_per_minute=20)
    with openai.OpenAI(base_url=f"http://{serve(bench)}/v1", api_key="a", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(70):
                client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert caught.value.code == "rate_limit_exceeded"
        patient = client.with_options(max_retries=3)
        assert patient.completions.create(model="tiny", prompt="x", max_tokens=1).choices
