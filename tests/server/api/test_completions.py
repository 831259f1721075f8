"""/v1/completions: shapes, echo, logprobs, stops, several prompts and answers, streams."""

from __future__ import annotations

from typing import Any

import pytest

from server.core import FinishReason

EOS = 257


def texts(answer: Any) -> list[str]:
    return [choice["text"] for choice in answer.json()["choices"]]


def test_shape_of_a_plain_answer(bench: Any) -> None:
    response = bench.complete()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [
        {"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 12,  # the end token counts
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_alias_is_answered_under_the_name_asked_for(bench: Any) -> None:
    assert bench.complete(model="org/alias").json()["model"] == "org/alias"


def test_default_length_is_sixteen(bench: Any) -> None:
    bench.script.text = "x" * 50
    body = bench.complete().json()
    assert body["choices"][0]["text"] == "x" * 16
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 16


def test_default_length_shrinks_to_what_fits(make_bench: Any) -> None:
    bench = make_bench(max_model_len=10)
    bench.script.text = "x" * 50
    assert bench.complete(prompt="12345678").json()["usage"]["completion_tokens"] == 2


def test_all_sampling_parameters_reach_the_engine(bench: Any) -> None:
    bench.complete(
        max_tokens=9, min_tokens=2, temperature=0, top_p=0.5, top_k=7, min_p=0.1, seed=-3, repetition_penalty=1.2,
        presence_penalty=-0.5, frequency_penalty=0.25, logit_bias={"5": -100, "257": 1.5}, stop_token_ids=[65, 66],
    )  # fmt: skip
    params = bench.params()
    assert (params.max_tokens, params.min_tokens, params.temperature) == (9, 2, 0.0)
    assert (params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 7, 0.1, -3)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, -0.5, 0.25)
    assert params.logit_bias == ((5, -100.0), (257, 1.5))
    assert params.stop_token_ids == {65, 66}
    assert params.eos_token_ids == {EOS}
    assert (params.logprobs, params.prompt_logprobs) == (None, None)


def test_defaults(bench: Any) -> None:
    bench.complete(top_k=-1)
    params = bench.params()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)


def test_model_authors_defaults_stand_between_request_and_openai(bench: Any, monkeypatch: Any) -> None:
    from server.tokenizer import SamplingDefaults

    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=40, repetition_penalty=1.1)
    monkeypatch.setattr(bench.service.tokenizer, "sampling_defaults", defaults)
    bench.complete()
    params = bench.params()
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.6, 0.9, 40, 1.1)
    bench.complete(temperature=0, top_k=0, top_p=1, repetition_penalty=1)
    params = bench.params()
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.0, 1.0, 0, 1.0)


def test_ignore_eos(bench: Any) -> None:
    bench.complete(ignore_eos=True)
    assert bench.params().eos_token_ids == frozenset()


def test_seeds_differ_between_answers_and_repeat_between_calls(bench: Any) -> None:
    bench.complete(n=3, seed=5)
    assert [request.params.seed for request in bench.engine.requests] == [5, 6, 7]
    bench.complete(n=2, seed=2**63 - 1)
    assert [request.params.seed for request in bench.engine.requests[3:]] == [2**63 - 1, -(2**63)]
    bench.complete()
    bench.complete()
    assert bench.engine.requests[-1].params.seed != bench.engine.requests[-2].params.seed


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        (["a", [98]], [[97], [98]]),
    ],
)
def test_forms_of_a_prompt(bench: Any, prompt: Any, ids: list[list[int]]) -> None:
    response = bench.complete(prompt=prompt)
    assert [request.prompt_ids for request in bench.engine.requests] == ids
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(ids)))
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_index_counts_answers_within_prompts(bench: Any) -> None:
    bench.script.text = lambda i: f"answer {i}"
    response = bench.complete(prompt=["a", "b"], n=2)
    assert texts(response) == ["answer 0", "answer 1", "answer 2", "answer 3"]
    assert [request.prompt_ids for request in bench.engine.requests] == [[97], [97], [98], [98]]
    assert len({request.request_id for request in bench.engine.requests}) == 4
    usage = response.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 4 * len("answer 0") + 4)


def test_best_of_equal_to_n_is_neutral(bench: Any) -> None:
    assert bench.complete(n=2, best_of=2).status_code == 200


@pytest.mark.parametrize("stop", [" wor", ["nope", " wor"]])
def test_stop_string_cuts_names_itself_and_aborts(bench: Any, stop: Any) -> None:
    body = bench.complete(stop=stop).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello", "stop", " wor")
    assert body["usage"]["completion_tokens"] == len("hello wor")
    assert bench.engine.generations[0].aborted


def test_stop_token_is_not_shown_but_named(bench: Any) -> None:
    body = bench.complete(stop_token_ids=[ord("w")]).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello ", "stop", ord("w"))
    assert body["usage"]["completion_tokens"] == len("hello w")


def test_held_back_text_is_released_at_the_end(bench: Any) -> None:
    assert texts(bench.complete(stop="world!")) == ["hello world"]


def test_min_tokens_shields_from_stop_strings(bench: Any) -> None:
    bench.script.text = "abab"
    assert texts(bench.complete(stop="ab", min_tokens=2)) == ["ab"]


def test_unfinished_character_at_the_end(bench: Any) -> None:
    bench.script.text = "a€"
    assert texts(bench.complete(max_tokens=2)) == ["a\ufffd"]
    assert texts(bench.complete(max_tokens=4)) == ["a€"]


def test_echo(bench: Any) -> None:
    assert texts(bench.complete(echo=True, n=2)) == ["sayhello world"] * 2
    assert texts(bench.complete(echo=True, prompt=[115, 256, 97])) == ["sahello world"]


def test_scoring_a_prompt(bench: Any) -> None:
    body = bench.complete(prompt="abc", echo=True, max_tokens=0, logprobs=1).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }
    assert body["usage"]["completion_tokens"] == 0
    assert bench.params().prompt_logprobs == 1


def test_logprobs_count_every_token_and_hold_the_sampled_one(bench: Any) -> None:
    bench.script.text = "a€"
    body = bench.complete(logprobs=2).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "<eos>"]
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
    assert len(logprobs["tokens"]) == body["usage"]["completion_tokens"]
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.5
        assert len(top) == 2 if token != "a" else True
    bench.complete(logprobs=0)
    assert bench.params().logprobs == 0


def test_logprobs_zero_shows_the_sampled_token(bench: Any) -> None:
    logprobs = bench.complete(logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"h": -0.5}]


def test_offsets_with_echo_begin_behind_the_prompt(bench: Any) -> None:
    bench.script.text = "xy"
    choice = bench.complete(prompt="né", echo=True, logprobs=0, max_tokens=2).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
    assert choice["text"][logprobs["text_offset"][3] :] == "xy"


def test_cached_tokens_are_reported(bench: Any) -> None:
    bench.script.num_cached = 2
    usage = bench.complete(n=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_stream_framing(bench: Any, read_events: Any) -> None:
    response = bench.complete(stream=True, max_tokens=3)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    events = read_events(response)
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    assert [set(chunk) for chunk in chunks] == [{"id", "object", "created", "model", "choices"}] * 4
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(c["text"], c["finish_reason"]) for c in choices] == [
        ("h", None),
        ("e", None),
        ("l", None),
        ("", "length"),
    ]
    assert all("logprobs" in c and c["logprobs"] is None for c in choices)


def test_stream_usage(bench: Any, read_events: Any) -> None:
    plain = bench.complete().json()["usage"]
    events = read_events(bench.complete(stream=True, stream_options={"include_usage": True}))
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == plain
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in events[:-2])
    events = read_events(bench.complete(stream=True, stream_options={"include_usage": False}))
    assert all("usage" not in chunk for chunk in events[:-1])


def test_stream_equals_the_whole_answer(bench: Any, read_events: Any) -> None:
    bench.script.text = lambda i: ("né👩‍👧 x", "plain", "stop here", "€")[i]
    options = {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "echo": True, "stop": ["p h", "zz"], "max_tokens": 40}
    whole = bench.complete(**options).json()["choices"]
    streamed: dict[int, dict[str, Any]] = {}
    order = []
    for chunk in read_events(bench.complete(stream=True, **options))[:-1]:
        (choice,) = chunk["choices"]
        order.append(choice["index"])
        got = streamed.setdefault(choice["index"], {"text": "", "tokens": [], "offsets": [], "finish": None})
        assert got["finish"] is None, "nothing follows the finish chunk"
        got["text"] += choice["text"]
        got["finish"] = choice["finish_reason"]
        if choice["finish_reason"] is not None:
            assert choice["text"] == ""
        if choice["logprobs"] is not None:
            got["tokens"] += choice["logprobs"]["tokens"]
            got["offsets"] += choice["logprobs"]["text_offset"]
    for choice in whole:
        got = streamed[choice["index"]]
        assert got["text"] == choice["text"]
        assert got["finish"] == choice["finish_reason"]
        assert got["tokens"] == choice["logprobs"]["tokens"]
        assert got["offsets"] == choice["logprobs"]["text_offset"] == sorted(got["offsets"])
    assert whole[2]["text"] == "bsto"
    assert order != sorted(order), "answers are interleaved"


def test_stream_never_shows_half_a_character(bench: Any, read_events: Any) -> None:
    bench.script.text = "👋🏽 é"
    chunks = read_events(bench.complete(stream=True, max_tokens=40))[:-1]
    assert [c["choices"][0]["text"] for c in chunks] == ["👋", "🏽", " ", "é", ""]


def test_end_without_a_reason_is_an_error(bench: Any) -> None:
    bench.script.end = FinishReason.ABORT
    response = bench.complete()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"


def test_an_answer_that_met_its_stop_is_aborted_while_the_others_go_on(bench: Any) -> None:
    bench.script.text = lambda i: ("stop" if i == 0 else "") + "x" * 100
    answers = texts(bench.complete(n=2, stop="stop", max_tokens=100))
    assert answers == ["", "x" * 100]
    stopped, other = bench.engine.generations
    assert stopped.aborted
    assert stopped.sequence.num_output_tokens < 10
    assert other.sequence.num_output_tokens == 100
