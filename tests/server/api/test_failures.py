"""One error body for every failure; request ids, keys, body limits, the access log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from server.core import FinishReason
from server.errors import BadRequest, DeadlineExceeded, EngineError, Overloaded

JSON = {"Content-Type": "application/json"}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_unknown_model(bench: Any) -> None:
    for response in (bench.complete(model="gpt-4"), bench.chat(model="gpt-4"), bench.client.get("/v1/models/gpt-4")):
        error = error_of(response, 404)
        assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "not_found_error")
        assert "tiny" in error["message"]


PATHS = ("/page/none.js", "/v1", "/v1/images", "/docs/", "/redoc", "/v1/completions/", "//v1/models")


@pytest.mark.parametrize("path", PATHS)
def test_unknown_route(bench: Any, path: str) -> None:
    assert error_of(bench.client.request("GET", f"http://testserver{path}"), 404)["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/health", "GET, HEAD"),
        ("OPTIONS", "/tokenize", "POST"),
    ],
)
def test_wrong_method(bench: Any, method: str, path: str, allow: str) -> None:
    response = bench.client.request(method, path)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == allow


def test_head_of_post_route(bench: Any) -> None:
    response = bench.client.head("/v1/completions")
    assert (response.status_code, response.content) == (405, b"")


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx", "\xe9"],
)
def test_wrong_content_type(bench: Any, kind: str | None) -> None:
    headers = [] if kind is None else [(b"content-type", kind.encode("latin-1"))]
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    response = bench.client.post("/v1/completions", content=body, headers=headers)
    assert error_of(response, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"])
def test_json_content_types(bench: Any, kind: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    assert bench.client.post("/v1/completions", content=body, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nope", b'{"a": }', b"\xff\xfe", b'"\xe9"', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"{} {}"],
    ids=lambda body: ascii(body[:10]),
)
def test_malformed_json(bench: Any, body: bytes) -> None:
    error = error_of(bench.client.post("/v1/completions", content=body, headers=JSON), 400)
    assert (error["code"], error["type"]) == ("invalid_json", "invalid_request_error")


@pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"text"'])
def test_json_that_is_no_object(bench: Any, body: bytes) -> None:
    error_of(bench.client.post("/v1/completions", content=body, headers=JSON), 400)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (Overloaded("full", retry_after_s=3), 503, "queue_full"),
        (Overloaded("bye", retry_after_s=3, code="draining"), 503, "draining"),
        (BadRequest("never fits", code="context_length_exceeded"), 400, "context_length_exceeded"),
        (EngineError("dead"), 500, "engine_error"),
    ],
)
def test_refusal_at_submit(bench: Any, refusal: Exception, status: int, code: str, stream: bool) -> None:
    bench.script.refuse = refusal
    response = bench.complete(stream=stream)
    assert error_of(response, status)["code"] == code
    rejected = status == 503
    assert response.headers.get("retry-after") == ("3" if rejected else None)
    assert bench.metric("vllm:admission_rejections_total", reason=code) == float(rejected)
    assert bench.metric("vllm:prompt_tokens_total") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(DeadlineExceeded("late"), 504, "deadline_exceeded"), (EngineError("broke"), 500, "engine_error")],
)
def test_failure_before_the_first_token_has_its_own_status(
    bench: Any, failure: Exception, status: int, code: str, stream: bool
) -> None:
    bench.script.error = failure
    response = bench.chat(stream=stream)
    assert error_of(response, status)["code"] == code
    assert response.headers.get("x-should-retry") == ("false" if status == 504 else None)
    assert bench.metric("vllm:request_success_total", finished_reason="error") == 1


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (DeadlineExceeded("late"), "deadline_exceeded"),
        (EngineError("broke"), "engine_error"),
        (RuntimeError("secret path /root"), "internal_error"),
    ],
)
def test_failure_in_a_stream_is_an_event_without_done(
    bench: Any, read_events: Any, failure: Exception, code: str, n: int
) -> None:
    bench.script.error, bench.script.fail_after = failure, 3
    events = read_events(bench.complete(stream=True, n=n))
    assert set(events[-1]) == {"error"}
    assert events[-1]["error"]["code"] == code
    assert "secret" not in events[-1]["error"]["message"]
    assert all("choices" in event for event in events[:-1])
    assert "[DONE]" not in events
    assert bench.engine.live == set()
    assert bench.metric("vllm:request_success_total", finished_reason="error") == n


def test_failure_of_one_answer_aborts_the_others(bench: Any) -> None:
    bench.script.error, bench.script.fail_after = EngineError("broke"), 2
    assert bench.complete(n=4).status_code == 500
    assert bench.engine.live == set()


def test_own_bug_leaks_nothing_and_names_the_request(bench: Any, caplog: Any) -> None:
    bench.script.refuse = RuntimeError("secret")
    with caplog.at_level(logging.ERROR):
        response = bench.post("/v1/completions", {"model": "tiny", "prompt": "x"}, headers={"X-Request-Id": "abc-1"})
    error = error_of(response, 500)
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert "secret" not in response.text
    assert "abc-1" in error["message"]
    assert any("abc-1" in record.message and record.exc_info for record in caplog.records)


def test_engine_that_ends_without_a_reason(bench: Any) -> None:
    bench.script.end = FinishReason.ERROR
    assert error_of(bench.complete(n=2), 500)["code"] == "engine_error"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_requests_while_loading(make_bench: Any, path: str) -> None:
    bodies = {
        "/v1/completions": {"model": "tiny", "prompt": "x"},
        "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }
    response = make_bench(loaded=False).post(path, bodies[path])
    assert error_of(response, 503)["code"] == "model_loading"
    assert response.headers["retry-after"] == "7"


@pytest.mark.parametrize("given", ["abc", "a b~!", "x" * 128])
def test_sane_request_ids_are_echoed(bench: Any, given: str) -> None:
    assert bench.client.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [b"x" * 129, b"\xe9", b"a\tb", b""])
def test_other_request_ids_are_replaced(bench: Any, given: bytes) -> None:
    got = bench.client.get("/health", headers=[(b"x-request-id", given)]).headers["x-request-id"]
    assert len(got) == 32
    assert got.isalnum()


def test_request_ids_differ_and_come_with_streams_and_errors(bench: Any) -> None:
    responses = [bench.complete(stream=True), bench.complete(n=0), bench.client.get("/nope"), bench.complete()]
    assert len({response.headers["x-request-id"] for response in responses}) == 4


GUARDED = ["/v1/models", "/v1/completions", "/tokenize", "/detokenize", "/v1/nope", "/v1/chat/completions"]


@pytest.fixture
def locked(make_bench: Any) -> Iterator[Any]:
    yield make_bench(api_keys=("first-key", "schlüssel"))


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2"]
)
def test_key_is_needed_before_the_body_is_looked_at(locked: Any, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = locked.client.post(path, content=b"{ broken", headers=headers)
    error = error_of(response, 401)
    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["first-key", "schlüssel"])
def test_any_key_opens(locked: Any, key: str) -> None:
    headers = [(b"authorization", b"bearer " + key.encode())]
    assert locked.client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version"])
def test_open_routes_need_no_key(locked: Any, path: str) -> None:
    assert locked.client.get(path).status_code == 200


def test_declared_body_over_the_limit(make_bench: Any) -> None:
    bench = make_bench(max_body_bytes=1024)
    body = json.dumps({"model": "tiny", "prompt": "x" * 2000})
    error = error_of(bench.client.post("/v1/completions", content=body, headers=JSON), 413)
    assert error["code"] == "request_too_large"
    assert "1024" in error["message"]
    fits = json.dumps({"model": "tiny", "prompt": "x"}).ljust(1024)
    assert bench.client.post("/v1/completions", content=fits, headers=JSON).status_code == 200
    assert bench.client.post("/v1/completions", content=fits + " ", headers=JSON).status_code == 413


def test_chunked_body_over_the_limit(make_bench: Any) -> None:
    bench = make_bench(max_body_bytes=1024)
    error_of(bench.client.post("/v1/completions", content=iter([b" " * 600] * 2), headers=JSON), 413)


def test_access_log_has_one_line_a_request(bench: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="server.access"):
        bench.client.get("/version", headers={"X-Request-Id": "me"})
        bench.complete(stream=True)
        bench.client.get("/n%0Aope")
    lines = [record.getMessage() for record in caplog.records if record.name == "server.access"]
    assert len(lines) == 3
    assert lines[0].startswith("GET /version 200 ")
    assert lines[0].endswith(" ms me")
    assert lines[1].startswith("POST /v1/completions 200 ")
    assert lines[2].startswith("GET /n\\nope 404 ")


def test_probes_are_logged_for_debugging_only(bench: Any, caplog: Any) -> None:
    with caplog.at_level(logging.DEBUG, logger="server.access"):
        for path in ("/health", "/ready", "/metrics"):
            bench.client.get(path)
    levels = [record.levelname for record in caplog.records if record.name == "server.access"]
    assert levels == ["DEBUG"] * 3


def test_http_metrics_by_route_not_by_path(bench: Any) -> None:
    bench.client.get("/v1/models/tiny")
    bench.client.get("/v1/models/nope")
    bench.client.get("/whatever")
    bench.client.request("BREW", "/pot")
    bench.complete(n=0)
    count = bench.metric
    name = "http_requests_total"
    assert count(name, handler="/v1/models/{model_id:path}", method="GET", status="200") == 1
    assert count(name, handler="/v1/models/{model_id:path}", method="GET", status="404") == 1
    assert count(name, handler="unmatched", method="GET", status="404") == 1
    assert count(name, handler="unmatched", method="other") == 1
    assert count(name, handler="/v1/completions", method="POST", status="400") == 1
    assert count("http_request_duration_seconds_count") == 5


def test_a_full_queue_refuses_before_the_body_is_looked_at(bench: Any) -> None:
    bench.service.full = Overloaded("the queue is full", retry_after_s=9)
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = bench.client.post(path, content=b"{ no json", headers=JSON)
        assert error_of(response, 503)["message"] == "the queue is full"
        assert response.headers["retry-after"] == "9"
    assert bench.metric("vllm:admission_rejections_total") == 2
    assert bench.client.get("/v1/models").status_code == 200
    assert bench.post("/tokenize", {"prompt": "say"}).status_code == 200
    bench.service.full = None
    assert bench.complete().status_code == 200
