"""/admin: who may, what is refused before the body is read, and what reaches the model's life."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from server.api.access_log import LOGGER
from server.api.keys import KeyFileError

ACTIONS = ("reload", "drain", "sleep", "wake")
OPERATOR = {"Authorization": "Bearer operator"}


@pytest.mark.parametrize("path", [*(f"/admin/{action}" for action in ACTIONS), "/admin/other", "/admin/"])
def test_without_an_admin_key_nobody_gets_in(make_bench: Any, path: str) -> None:
    bench = make_bench(api_keys=("client",))
    for headers in ({}, {"Authorization": "Bearer client"}, {"Authorization": "Bearer "}):
        response = bench.client.post(path, content=b"{", headers=headers)
        assert response.status_code == 403
        error = response.json()["error"]
        assert "--admin-key" in error["message"] and error["code"] == "forbidden"
    assert bench.service.current.phase == "ready"


@pytest.mark.parametrize(
    "given", [None, "Bearer client", "Bearer operator2", "Bearer oper", "Basic operator", "operator"]
)
@pytest.mark.parametrize("action", ACTIONS)
def test_only_the_admin_key_opens_it(make_bench: Any, action: str, given: str | None) -> None:
    bench = make_bench(api_keys=("client",), admin_key="operator")
    bench.service.current.phase = "loading"
    headers = {} if given is None else {"Authorization": given}
    response = bench.client.post(f"/admin/{action}", content=b"{", headers=headers)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert bench.service.current.phase == "loading"


def test_the_header_of_anthropics_clients_does_not_carry_it(make_bench: Any) -> None:
    bench = make_bench(api_keys=("client",), admin_key="operator")
    for headers in ({"x-api-key": "operator"}, {"x-api-key": "operator", "Authorization": ""}):
        response = bench.client.post("/admin/sleep", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "Authorization: Bearer KEY" in response.json()["error"]["message"]
    assert bench.service.current.phase == "ready"
    schemes = bench.client.get("/openapi.json").json()["components"]["securitySchemes"]
    assert (schemes["admin"]["type"], schemes["admin"]["scheme"]) == ("http", "bearer")
    both = {"x-api-key": "client", **OPERATOR}
    assert bench.client.post("/admin/sleep", headers=both).status_code == 200


def test_the_admin_key_opens_nothing_else(make_bench: Any) -> None:
    bench = make_bench(api_keys=("client",), admin_key="operator")
    for path in ("/v1/models", "/v1/load", "/tokenizer_info", "/admin"):
        assert bench.client.get(path, headers=OPERATOR).status_code == 401
    assert bench.client.get("/v1/models", headers={"Authorization": "Bearer client"}).status_code == 200


def test_a_client_may_not_have_the_admin_key(make_bench: Any) -> None:
    with pytest.raises(KeyFileError, match="also the API key alice") as caught:
        make_bench(api_keys=("alice=same",), admin_key="same")
    assert "same" not in str(caught.value).replace("the same", "")


@pytest.mark.parametrize(
    ("action", "phase"), [("reload", "ready"), ("drain", "drained"), ("sleep", "sleeping"), ("wake", "ready")]
)
def test_actions_answer_with_phase_and_seconds(make_bench: Any, action: str, phase: str) -> None:
    bench = make_bench(admin_key="operator")
    for body in ({}, {"json": {}}):
        response = bench.client.post(f"/admin/{action}", headers=OPERATOR, **body)
        assert response.status_code == 200 and response.json()["phase"] == phase
        assert 0 <= response.json()["seconds"] < 5
    wrong = bench.client.post(f"/admin/{action}", headers=OPERATOR, json={"force": True})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "force")
    assert bench.client.get(f"/admin/{action}", headers=OPERATOR).status_code == 405
    typed = bench.client.post(f"/admin/{action}", headers=OPERATOR | {"Content-Type": "text/plain"}, content=b"{}")
    assert typed.status_code == 415


def test_sleep_waits_where_told_to(make_bench: Any) -> None:
    bench = make_bench(admin_key="operator")
    for body in ({}, {"json": {"wait": True}}, {"json": {"wait": False}}):
        bench.client.post("/admin/sleep", headers=OPERATOR, **body)
    assert bench.service.life.waited == [False, True, False]
    assert bench.client.post("/admin/sleep", headers=OPERATOR, json={"wait": "yes"}).status_code == 400


def test_log_and_metrics_see_it(make_bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    bench = make_bench(admin_key="operator", access_log="json")
    with caplog.at_level(logging.INFO, LOGGER):
        bench.client.post("/admin/wake", headers=OPERATOR)
        bench.client.post("/admin/wake")
    done, refused = (json.loads(record.message) for record in caplog.records if record.name == LOGGER)
    assert (done["path"], done["status"], done["key"]) == ("/admin/wake", 200, "(admin)")
    assert (refused["status"], refused["key"], refused["error"]) == (401, None, "invalid_api_key")
    assert "operator" not in caplog.text
    assert bench.metric("http_requests_total", handler="/admin/wake", status="200") == 1


def test_the_document_says_which_key(bench: Any) -> None:
    schema = bench.client.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"].keys() == {"key", "x_api_key", "admin"}
    assert schema["security"] == [{}, {"key": []}, {"x_api_key": []}]
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation.get("security") == ([{"admin": []}] if path.startswith("/admin/") else None)


def test_a_sleeping_server_is_ready(bench: Any) -> None:
    bench.service.current.phase = "sleeping"
    response = bench.client.get("/ready")
    assert (response.status_code, response.json()["phase"]) == (200, "sleeping")
    assert bench.client.get("/health").status_code == 200
    bench.service.current.phase = "drained"
    assert bench.client.get("/ready").status_code == 503
