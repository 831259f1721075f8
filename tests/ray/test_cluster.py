"""The server on two Ray nodes: placement, streams through the proxy, clients that leave, and the loss of a node."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed here: make test-scale")

from ray import serve

from server.ray_app import NAME
from tests.ray.service import Running, serving, wait_until

pytestmark = pytest.mark.slow
LONG = 400  # tokens of an answer: seconds, with the slow kernels that the replicas are given


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with serving(2) as running:
        yield running


def events_of(service: Running, first: threading.Barrier | None = None, **body: Any) -> list[dict[str, Any] | str]:
    """Payloads of a stream, [DONE] as a text; waits at `first` when one has come."""
    events: list[dict[str, Any] | str] = []
    body = {"model": "demo", "prompt": "It was", "stream": True, "ignore_eos": True, **body}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
                if first is not None and len(events) == 1:
                    first.wait(60)
    return events


def test_replicas_are_spread_over_the_nodes(service: Running) -> None:
    assert {replica["node_ip"] for replica in service.replicas()} == {"127.0.0.2", "127.0.0.3"}


def test_what_is_about_one_server_is_not_answered_by_chance(service: Running) -> None:
    for path in ("/metrics", "/load", "/v1/load"):
        answer = httpx.get(service.url + path)
        assert answer.status_code == 404 and "replicas" in answer.json()["error"]["message"]
    assert httpx.post(f"{service.url}/admin/sleep").status_code == 403
    assert httpx.get(f"{service.url}/ready").json()["phase"] == "ready"


def test_a_stream_comes_token_by_token(service: Running) -> None:
    body = {"model": "demo", "prompt": "It was", "max_tokens": 64, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=120) as response:
        parts = [part for part in response.iter_raw() if part]
    assert b"".join(parts).count(b'"text":') == 64 + 1  # the last one says why it ended
    assert len(parts) > 8, "tokens came in lumps"  # a busy machine reads several at a time
    assert parts[-1].endswith(b"data: [DONE]\n\n")


def test_the_openai_client_works(service: Running) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "Tell me of the sea."}]
    whole = client.chat.completions.create(model="demo", messages=messages, max_tokens=12, seed=1)
    stream = client.chat.completions.create(model="demo", messages=messages, max_tokens=12, seed=1, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="colour"):
        client.chat.completions.create(model="demo", messages=messages, extra_body={"colour": 1})


def test_a_request_has_one_id(service: Running) -> None:
    answer = httpx.get(f"{service.url}/v1/models", headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_too_long_a_body_is_refused(service: Running) -> None:
    answer = httpx.post(f"{service.url}/v1/completions", content=b"x" * (9 * 1024**2), timeout=60)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_a_prometheus_that_scrapes_the_nodes_has_every_replica(service: Running) -> None:
    assert service.post("/v1/completions", prompt="It was", max_tokens=4).status_code == 200

    def counting() -> set[str]:
        """Replicas that tell of their sequences."""
        return set(re.findall(r'^ray_vllm_num_requests_running{.*replica="([^"]+)"', service.metrics(), re.M))

    wait_until(lambda: len(counting()) == 2, 60)
    wait_until(lambda: bool(re.search(r"^ray_vllm_generation_tokens_total{.*} [1-9]", service.metrics(), re.M)), 60)


def records(service: Running, request_id: str) -> list[dict[str, Any]]:
    """Of the servers' access logs, in the files that Ray keeps of its workers' output."""
    lines = [line for line in service.log_lines("worker-*.out") if request_id in line]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_work(service: Running, stream: bool) -> None:
    request_id = f"leaves-{stream}"
    body = {"model": "demo", "prompt": "It was", "max_tokens": LONG, "n": 8, "ignore_eos": True, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{service.url}/v1/completions", json=body, headers={"X-Request-Id": request_id},
                          timeout=60) as response:  # fmt: skip
            next(response.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/v1/completions", json=body, headers={"X-Request-Id": request_id}, timeout=0.3)
    wait_until(lambda: len(records(service, request_id)) == 1, 20)
    (record,) = records(service, request_id)
    assert record["completion_tokens"] < 8 * LONG
    assert "length" not in record["finish_reasons"]


def test_a_replica_that_is_killed_is_replaced(service: Running) -> None:
    before = {replica["pid"] for replica in service.replicas()}
    lost = min(before)
    os.kill(lost, signal.SIGKILL)
    wait_until(lambda: lost not in {replica["pid"] for replica in service.replicas()}, 60)
    service.wait_for_replicas(2)
    assert service.post("/v1/completions", prompt="It was", max_tokens=4).status_code == 200


def test_the_loss_of_a_node_costs_streams_that_had_begun_and_nothing_else(service: Running) -> None:
    (lost,) = (replica for replica in service.replicas() if replica["node_ip"] == "127.0.0.3")
    begun = threading.Barrier(9)
    with ThreadPoolExecutor(24) as pool:
        others = [pool.submit(service.post, "/v1/completions", prompt="It was", max_tokens=2 * LONG, ignore_eos=True)
                  for _ in range(8)]  # fmt: skip
        time.sleep(0.2)  # they are routed first, so the replicas have them when the streams have begun
        streams = [pool.submit(events_of, service, begun, max_tokens=LONG) for _ in range(8)]
        begun.wait(60)
        os.kill(lost["pid"], signal.SIGKILL)  # with its machine; Ray's workers take a while to see that theirs is gone
        service.cluster.remove_node(service.nodes[1], allow_graceful=False)
        ends = [stream.result()[-1] for stream in streams]
        answers = [other.result() for other in others]
        later = [service.post("/v1/completions", prompt="It was", max_tokens=4) for _ in range(20)]
    broken = [end for end in ends if end != "[DONE]"]
    assert 0 < len(broken) < 8
    assert all(isinstance(end, dict) and end["error"]["code"] == "replica_lost" for end in broken)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [2 * LONG] * 8
    assert any("lost with its replica, before its answer" in line for line in service.log_lines("proxy_*.log"))
    assert [answer.status_code for answer in later] == [200] * 20


def test_a_node_that_joins_gets_a_replica(service: Running) -> None:
    service.add_node()
    wait_until(lambda: {replica["node_ip"] for replica in service.replicas()} == {"127.0.0.2", "127.0.0.4"}, 120)
    answers = [service.post("/v1/completions", prompt="It was", max_tokens=4).status_code for _ in range(20)]
    assert answers == [200] * 20


def test_a_service_that_is_ended_ends_its_streams_first(service: Running) -> None:
    """The last one: the service is gone afterwards."""
    begun = threading.Barrier(3)
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(events_of, service, begun, max_tokens=60) for _ in range(2)]
        begun.wait(60)
        serve.delete(NAME)
        assert [stream.result()[-1] for stream in streams] == ["[DONE]"] * 2
    assert service.replicas() == []
