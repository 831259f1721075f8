"""/openapi.json and /docs: complete, true to the server, and without anything from elsewhere."""

from __future__ import annotations

import re
from typing import Any

import pytest

from server.api.examples import EXAMPLES


@pytest.fixture
def named(make_bench: Any) -> Any:
    """A server of the examples' model."""
    return make_bench(served_model_names=("storyteller",), admin_key="operator")


def test_every_operation_is_described_with_examples_and_errors(bench: Any) -> None:
    schema = bench.client.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    assert schema["info"]["title"] == "spq-serve" and schema["info"]["version"]
    found = set()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            found.add((method, path))
            assert operation["summary"] and operation["description"].endswith("."), path
            content = operation["responses"]["200"]["content"]
            assert all("example" in kind and "schema" in kind for kind in content.values()), path
            assert "422" not in operation["responses"]
            if method == "post":
                assert {"4XX", "5XX"} <= operation["responses"].keys()
                assert "example" in operation["requestBody"]["content"]["application/json"]
            for status in {"4XX", "5XX"} & operation["responses"].keys():
                assert set(operation["responses"][status]["content"]["application/json"]["example"]["error"]) == {
                    "message", "type", "param", "code",
                }  # fmt: skip
    assert found == EXAMPLES.keys()
    streams = [p for p, m in schema["paths"].items() if "post" in m
               and "text/event-stream" in m["post"]["responses"]["200"]["content"]]  # fmt: skip
    assert streams == ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]


@pytest.mark.parametrize("operation", EXAMPLES, ids=" ".join)
def test_examples_are_served_as_they_stand(named: Any, operation: tuple[str, str]) -> None:
    method, path = operation
    example = EXAMPLES[operation]
    path = path.replace("{model_id}", "storyteller")
    if "{response_id}" in path:
        made = named.post("/v1/responses", EXAMPLES["post", "/v1/responses"].request)
        path = path.replace("{response_id}", made.json()["id"])
    headers = {"Authorization": "Bearer operator"} if path.startswith("/admin/") else {}
    response = named.client.request(method, path, json=example.request, headers=headers)
    assert response.status_code == 200, response.text
    if isinstance(example.response, str):
        assert example.response.partition("{")[0] in response.text
    else:
        extra = {"sha"} if path == "/tokenizer_info" else set()
        assert set(example.response) - extra <= set(response.json())
    if example.stream is not None:
        streamed = named.client.request(method, path, json={**(example.request or {}), "stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")


def test_examples_of_answers_fit_the_schema(bench: Any) -> None:
    from server.api import admin, admin_actions, chat, completions, embeddings, load, responses_api, text

    checked = 0
    for module in (admin, admin_actions, chat, completions, embeddings, load, responses_api, text):
        for route in module.router.routes:
            model = route.response_model
            for method in route.methods:
                example = EXAMPLES[method.lower(), route.path.replace(":path", "")]
                if hasattr(model, "model_validate"):
                    model.model_validate(example.response)
                    checked += 1
    assert checked > 8


def test_the_page_loads_nothing_from_elsewhere(make_bench: Any) -> None:
    bench = make_bench(api_keys=("secret",))
    response = bench.client.get("/docs")
    assert response.status_code == 200, "no key is needed to read how to send one"
    assert not re.findall(r"https?://", response.text)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy
    links = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    assert set(links) == {"/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/docs/favicon.png"}
    for link in links:
        asset = bench.client.get(link)
        assert asset.status_code == 200 and len(asset.content) > 1000
    assert "/openapi.json" in response.text
    assert bench.client.get("/openapi.json").status_code == 200


@pytest.mark.parametrize("name", ["redoc.standalone.js", "../core.py", "%2e%2e%2fcore.py", "nothing"])
def test_no_other_file_is_served(bench: Any, name: str) -> None:
    response = bench.client.get(f"/docs/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
