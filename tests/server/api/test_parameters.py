"""The parameters beyond OpenAI's own, on both endpoints: what reaches the engine, and what stands beside the text."""

from __future__ import annotations

from typing import Any

import pytest

EOS = 257
MESSAGES = [{"role": "user", "content": "say"}]
PROMPT = "[user]say\n[assistant]"


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def refused(response: Any, param: str) -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    return str(error["message"])


@pytest.fixture(params=["complete", "chat"])
def call(bench: Any, request: Any) -> Any:
    return getattr(bench, request.param)


def test_a_request_id_ends_the_answers_id_and_may_be_used_twice(bench: Any, call: Any) -> None:
    first, second = call(request_id="abc-1"), call(request_id="abc-1")
    assert first.json()["id"] == second.json()["id"]
    assert first.json()["id"].endswith("cmpl-abc-1")
    assert len({request.request_id for request in bench.engine.requests}) == 2
    refused(call(request_id="two words"), "request_id")
    refused(call(request_id=""), "request_id")


def test_session_id_is_accepted(call: Any) -> None:
    assert call(session_id="s").status_code == 200


def test_allowed_tokens_reach_the_engine_once_each(bench: Any, call: Any) -> None:
    call(allowed_token_ids=[5, 6, 5])
    assert bench.params().allowed_token_ids == (5, 6)
    refused(call(allowed_token_ids=[]), "allowed_token_ids")
    refused(call(allowed_token_ids=[258]), "allowed_token_ids")
    refused(call(allowed_token_ids=[EOS, 7], stop_token_ids=[7], min_tokens=1), "min_tokens")
    assert call(allowed_token_ids=[EOS, 7], stop_token_ids=[7]).status_code == 200


def test_bad_words_are_spelled_with_and_without_a_space(bench: Any, call: Any) -> None:
    call(bad_words=["no", " b"])
    assert bench.params().bad_words == (tuple(b"no"), tuple(b" no"), tuple(b" b"))
    assert bench.params().needs_host
    call(bad_words=[])
    assert bench.params().bad_words == () and not bench.params().needs_host
    refused(call(bad_words=[""]), "bad_words[0]")
    refused(call(bad_words="no"), "bad_words")


def test_the_stop_string_is_part_of_the_text_where_asked_for(bench: Any, call: Any, read_events: Any) -> None:
    assert text_of(call(stop=" wor")) == "hello"
    assert text_of(call(stop=" wor", include_stop_str_in_output=True)) == "hello wor"
    assert text_of(call(stop_token_ids=[ord("w")], include_stop_str_in_output=True)) == "hello w"
    events = read_events(call(stop=" wor", include_stop_str_in_output=True, stream=True))[:-1]
    pieces = [e["choices"][0].get("text") or e["choices"][0].get("delta", {}).get("content", "") for e in events]
    assert "".join(pieces) == "hello wor"
    assert events[-1]["choices"][0]["stop_reason"] == " wor"


def test_control_tokens_are_shown_where_asked_for(call: Any) -> None:
    assert text_of(call(include_stop_str_in_output=True)) == "hello world"
    assert text_of(call(include_stop_str_in_output=True, skip_special_tokens=False)) == "hello world<eos>"
    assert text_of(call(skip_special_tokens=False, spaces_between_special_tokens=False)) == "hello world"


def test_echo_shows_the_prompts_control_tokens_too(bench: Any) -> None:
    bench.script.text = "x"
    assert text_of(bench.complete(prompt=[97, EOS, 98], echo=True, skip_special_tokens=False)) == "a<eos>bx"
    body = bench.complete(prompt=[97, EOS, 98], echo=True, skip_special_tokens=False, logprobs=0).json()
    assert body["choices"][0]["logprobs"]["text_offset"][:4] == [0, 1, 6, 7]


def test_token_ids_of_a_completion(bench: Any, read_events: Any) -> None:
    bench.script.text = "né"
    choices = bench.complete(prompt=["a", "b"], n=2, return_token_ids=True).json()["choices"]
    assert [c["token_ids"] for c in choices] == [[*"né".encode(), EOS]] * 4
    assert [c["prompt_token_ids"] for c in choices] == [[97], [97], [98], [98]]
    events = read_events(bench.complete(prompt=["a", "b"], n=2, return_token_ids=True, stream=True))[:-1]
    streamed: dict[int, list[int]] = {}
    prompts: dict[int, list[int]] = {}
    for event in events:
        [choice] = event["choices"]
        assert ("prompt_token_ids" in choice) == (choice["index"] not in streamed)
        prompts.setdefault(choice["index"], choice.get("prompt_token_ids"))
        streamed.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert streamed == {i: [*"né".encode(), EOS] for i in range(4)}
    assert prompts == {0: [97], 1: [97], 2: [98], 3: [98]}
    assert "token_ids" not in bench.complete().json()["choices"][0]


def test_token_ids_of_a_chat(bench: Any, read_events: Any) -> None:
    body = bench.chat(return_token_ids=True, max_tokens=2, n=2).json()
    prompt = [256, *PROMPT.encode()]
    assert body["prompt_token_ids"] == prompt
    assert [c["token_ids"] for c in body["choices"]] == [list(b"he")] * 2
    events = read_events(bench.chat(return_token_ids=True, max_tokens=2, stream=True))[:-1]
    assert [e.get("prompt_token_ids") for e in events] == [prompt, *[None] * (len(events) - 1)]
    assert [i for e in events for i in e["choices"][0]["token_ids"]] == list(b"he")


def test_tokens_are_named_by_id_where_asked_for(bench: Any) -> None:
    logprobs = bench.complete(logprobs=2, max_tokens=1, return_tokens_as_token_ids=True).json()["choices"][0][
        "logprobs"
    ]
    assert logprobs["tokens"] == ["token_id:104"]
    assert logprobs["top_logprobs"] == [{"token_id:104": -0.5, "token_id:65": -2.0}]
    body = bench.chat(logprobs=True, top_logprobs=1, max_tokens=1, return_tokens_as_token_ids=True).json()
    [entry] = body["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"], entry["top_logprobs"][0]["token"]) == (
        "token_id:104",
        [104],
        "token_id:104",
    )


def test_named_logprobs_need_logprobs(bench: Any) -> None:
    bench.complete(logprobs=0, logprob_token_ids=[7, 9, 7])
    assert (bench.params().logprob_token_ids, bench.params().logprobs) == ((7, 9), 0)
    bench.chat(logprobs=True, logprob_token_ids=[7])
    assert bench.params().logprob_token_ids == (7,)
    refused(bench.complete(logprob_token_ids=[7]), "logprob_token_ids")
    refused(bench.complete(logprob_token_ids=[7], logprobs=1, echo=True, max_tokens=0), "logprob_token_ids")
    refused(bench.complete(logprob_token_ids=[], logprobs=1), "logprob_token_ids")
    refused(bench.complete(logprob_token_ids=[258], logprobs=1), "logprob_token_ids")
    refused(bench.complete(logprob_token_ids=list(range(129)), logprobs=1), "logprob_token_ids")
    refused(bench.chat(logprob_token_ids=[7]), "logprob_token_ids")


def test_usage_so_far_on_every_chunk(call: Any, read_events: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, done = read_events(call(stream=True, stream_options=options))
    assert done == "[DONE]" and last["choices"] == []
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and len(set(counts)) > 5
    assert chunks[-1]["usage"] == last["usage"]
    response = call(stream=True, stream_options={"continuous_usage_stats": True})
    refused(response, "stream_options.continuous_usage_stats")


def test_scores_of_the_prompt(bench: Any) -> None:
    expected = [
        None,
        {"97": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
         "65": {"logprob": -2.0, "rank": 2, "decoded_token": "A"}},
    ]  # fmt: skip
    body = bench.complete(prompt="sa", n=2, prompt_logprobs=2).json()
    assert [c["prompt_logprobs"] for c in body["choices"]] == [expected] * 2
    assert all(c["logprobs"] is None for c in body["choices"])
    chat = bench.chat(prompt_logprobs=0).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert list(chat["prompt_logprobs"][-1]) == [str(ord("]"))]
    refused(bench.complete(prompt_logprobs=1, stream=True), "prompt_logprobs")
    refused(bench.complete(prompt_logprobs=21), "prompt_logprobs")
    refused(bench.complete(prompt_logprobs=-1), "prompt_logprobs")


def test_scores_of_the_prompt_beside_an_echo(bench: Any) -> None:
    choice = bench.complete(prompt="sa", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=0).json()["choices"][0]
    assert bench.params().prompt_logprobs == 3
    assert len(choice["prompt_logprobs"][1]) == 3
    assert choice["logprobs"]["top_logprobs"] == [None, {"a": -0.5}]
    choice = bench.complete(prompt="sa", echo=True, prompt_logprobs=0).json()["choices"][0]
    assert choice["logprobs"] is None and list(choice["prompt_logprobs"][1]) == ["97"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "def"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, "def"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 99}, "abcdef"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 6}, "cdef"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 9}, "f"),
    ],
)
@pytest.mark.parametrize("as_ids", [False, True])
def test_truncated_prompts(make_bench: Any, options: dict[str, Any], kept: str, as_ids: bool) -> None:
    bench = make_bench(max_model_len=10)
    prompt = list(b"abcdef") if as_ids else "abcdef"
    response = bench.complete(**{"prompt": prompt, "max_tokens": 1, "echo": True, **options})
    assert text_of(response).startswith(kept + "h")
    assert bytes(bench.engine.requests[-1].prompt_ids).decode() == kept
    assert response.json()["usage"]["prompt_tokens"] == len(kept)


def test_truncated_chats(make_bench: Any) -> None:
    bench = make_bench(max_model_len=10)
    assert bench.chat(truncate_prompt_tokens=4, max_tokens=2).json()["usage"]["prompt_tokens"] == 4
    assert bytes(bench.engine.requests[-1].prompt_ids) == b"ant]"
    assert bench.chat(truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == 9


def test_truncation_refusals(call: Any) -> None:
    refused(call(truncation_side="left"), "truncation_side")
    refused(call(truncation_side="middle", truncate_prompt_tokens=1), "truncation_side")
    refused(call(truncate_prompt_tokens=0), "truncate_prompt_tokens")
    refused(call(truncate_prompt_tokens=-2), "truncate_prompt_tokens")


def test_priority_needs_its_policy(make_bench: Any) -> None:
    plain, ordered = make_bench(), make_bench(scheduling_policy="priority")
    for name in ("complete", "chat"):
        assert "--scheduling-policy" in refused(getattr(plain, name)(priority=1), "priority")
        assert getattr(plain, name)(priority=0).status_code == 200
        assert getattr(ordered, name)(priority=-7).status_code == 200
        assert ordered.engine.requests[-1].priority == -7


def test_salts_reach_the_engine(bench: Any, call: Any) -> None:
    call(cache_salt="secret")
    assert bench.engine.requests[-1].cache_salt == "secret"
    refused(call(cache_salt=""), "cache_salt")


def prompt_text(bench: Any) -> str:
    return bytes(i for i in bench.engine.requests[-1].prompt_ids if i < 256).decode()


def test_templates_of_requests_need_the_operators_word(make_bench: Any) -> None:
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ mood }}"
    assert "--trust-request-chat-template" in refused(make_bench().chat(chat_template=template), "chat_template")
    bench = make_bench(trust_request_chat_template=True)
    assert bench.chat(chat_template=template, chat_template_kwargs={"mood": "!"}).status_code == 200
    assert prompt_text(bench) == "<say>!"


@pytest.mark.parametrize(
    "template",
    [
        "{% for",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include 'x' %}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_of_the_sandbox_is_a_bad_request(make_bench: Any, template: str) -> None:
    bench = make_bench(trust_request_chat_template=True)
    refused(bench.chat(chat_template=template), "chat_template")
    assert bench.chat().status_code == 200


def test_template_variables_and_documents(bench: Any, monkeypatch: Any) -> None:
    template = (
        "{% if not enable_thinking %}[quick]{% endif %}{% for d in documents or [] %}({{ d.title }}: {{ d.text }})"
        "{% endfor %}{{ messages[0].content }}"
    )
    monkeypatch.setattr(bench.service.tokenizer, "chat_template", template)
    bench.chat(chat_template_kwargs={"enable_thinking": False})
    assert prompt_text(bench) == "[quick]say"
    documents = [{"title": "<eos>", "text": "b"}]
    bench.chat(chat_template_kwargs={"enable_thinking": True}, documents=documents)
    assert prompt_text(bench) == "(<eos>: b)say"
    assert EOS not in bench.engine.requests[-1].prompt_ids, "a document cannot forge a control token"


@pytest.mark.parametrize("name", ["messages", "tokenize", "chat_template", "tools"])
def test_variables_do_not_take_the_renderers_names(bench: Any, name: str) -> None:
    refused(bench.chat(chat_template_kwargs={name: 1}), "chat_template_kwargs")
    refused(bench.chat(chat_template_kwargs=[]), "chat_template_kwargs")
    refused(bench.chat(documents=[{"title": 1}]), "documents[0].title")
