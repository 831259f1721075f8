"""LiteLLM against a server; run by test_litellm.py in an environment of its own (requirements-clients.txt).

LiteLLM wants openai below 3 and huggingface-hub below 2, which are not those of this project.
Arguments: base URLs of a server with the keys `right` and `limited` (one request a minute), and of one without a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import traceback
import urllib.request
from collections.abc import Callable
from typing import Any

import litellm

MESSAGES = [{"role": "user", "content": "The old man said"}]
PROVIDERS = ("openai/demo", "hosted_vllm/demo")
SCHEMA = {
    "type": "object",
    "properties": {"to": {"enum": ["Oslo", "Rome"]}, "seats": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["to", "seats"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "book", "parameters": SCHEMA}}]
FORCED = {"type": "function", "function": {"name": "book"}}
# 1.106.2 imports its own proxy (the extra `proxy`, some hundred packages) wherever a request has tools
WITHOUT_PROXY = {"_skip_mcp_handler": True}


class Checks:
    """Every method whose name begins with `check_` is a check; it raises where something is wrong."""

    def __init__(self, url: str, small_url: str) -> None:
        self._common: dict[str, Any] = {"api_base": url, "api_key": "right", "num_retries": 0, "max_retries": 0}
        self._small_url = small_url
        # hosted_vllm takes `additionalProperties` and `strict` out of tools: the model needs a reason to end an object
        body = json.dumps({"prompt": "}", "add_special_tokens": False}).encode()
        headers = {"Authorization": "Bearer right", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url.replace("/v1", "/tokenize"), body, headers)) as answer:
            [brace] = json.load(answer)["tokens"]
        self._forced = {
            "tools": TOOLS, "tool_choice": FORCED, "max_tokens": 200, "logit_bias": {str(brace): 20}, **WITHOUT_PROXY,
        }  # fmt: skip

    def _chat(self, model: str, **options: Any) -> Any:
        options = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0, "seed": 1, **self._common, **options}
        return litellm.completion(model=model, **options)

    def check_completion(self, model: str) -> None:
        answer = self._chat(model)
        assert answer.choices[0].message.content and answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 20
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20

    def check_stream(self, model: str) -> None:
        whole = self._chat(model)
        chunks = list(self._chat(model, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        assert built.choices[0].message.content == whole.choices[0].message.content
        assert built.usage.total_tokens == whole.usage.total_tokens

    def check_async(self, model: str) -> None:
        async def ask() -> list[str]:
            options = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0, **self._common}
            whole = await litellm.acompletion(model=model, **options)
            stream = await litellm.acompletion(model=model, stream=True, **options)
            return [
                whole.choices[0].message.content,
                "".join([c.choices[0].delta.content or "" async for c in stream]),
            ]

        first, second = asyncio.run(ask())
        assert first == second != ""

    def check_text_completion(self, model: str) -> None:
        model = model.replace("openai/", "text-completion-openai/")
        options = {"prompt": "It was", "max_tokens": 12, "temperature": 0, **self._common}
        whole = litellm.text_completion(model=model, **options)
        assert whole.choices[0].text and whole.usage.completion_tokens == 12
        chunks = litellm.text_completion(model=model, stream=True, **options)
        assert "".join(c.choices[0].text or "" for c in chunks) == whole.choices[0].text

    def check_embedding(self, model: str) -> None:
        answer = litellm.embedding(model=model, input=["a ship", "a house"], **self._common)
        assert [entry["index"] for entry in answer.data] == [0, 1]
        assert abs(sum(x * x for x in answer.data[0]["embedding"]) - 1) < 1e-4

    def check_tools(self, model: str) -> None:
        message = self._chat(model, **self._forced).choices[0].message
        [call] = message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "book" and arguments["to"] in ("Oslo", "Rome"), arguments
        result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        after = self._chat(model, messages=[*MESSAGES, message, result])
        assert after.choices[0].message.content

    def check_streamed_tools(self, model: str) -> None:
        chunks = list(self._chat(model, stream=True, **self._forced))
        pieces = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        assert len(pieces) > 3 and pieces[0].function.name == "book"
        assert json.loads("".join(p.function.arguments for p in pieces))["to"] in ("Oslo", "Rome")
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

    def check_response_format(self, model: str) -> None:
        wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
        content = self._chat(model, response_format=wanted, max_tokens=200).choices[0].message.content
        assert 1 <= json.loads(content)["seats"] <= 9

    def check_errors(self, model: str) -> None:
        cases: list[tuple[type[Exception], dict[str, Any]]] = [
            (litellm.AuthenticationError, {"api_key": "wrong"}),
            (litellm.NotFoundError, {"model": model.replace("demo", "other")}),
            (litellm.BadRequestError, {"temperature": -3}),
            (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "word " * 4000}]}),
            (litellm.ContextWindowExceededError, {"max_tokens": 5000}),
            (litellm.ServiceUnavailableError, {"api_base": self._small_url, "n": 2}),
        ]
        for wanted, options in cases:
            self._expect(wanted, **{"model": model, **options})

    def check_rate_limit(self, model: str) -> None:
        with contextlib.suppress(litellm.RateLimitError):  # the other provider's check may have used the minute
            self._chat(model, api_key="limited", max_tokens=1)
        self._expect(litellm.RateLimitError, model=model, api_key="limited", max_tokens=1)

    def _expect(self, wanted: type[Exception], **options: Any) -> None:
        try:
            self._chat(**options)
        except Exception as error:
            assert type(error) is wanted, f"{type(error).__name__} where {wanted.__name__} was expected: {error}"
        else:
            raise AssertionError(f"no {wanted.__name__}")


def outcome(check: Callable[[str], None], model: str) -> str:
    """Empty, or the traceback."""
    try:
        check(model)
    except Exception:
        return traceback.format_exc()
    return ""


def main() -> None:
    """All checks with all providers."""
    litellm.suppress_debug_info = True
    checks = Checks(*sys.argv[1:])
    found = {
        f"{name.removeprefix('check_')}-{model.partition('/')[0]}": outcome(getattr(checks, name), model)
        for name in dir(checks)
        if name.startswith("check_")
        for model in PROVIDERS
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
