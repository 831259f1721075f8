"""docs/api.md: every endpoint and every field of a request stands in it; the tests it and features.md name exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from server.api.chat_request import ChatCompletionRequest, ChatMessage
from server.api.completion_request import CompletionRequest
from server.api.embeddings import EmbeddingRequest
from server.api.message_request import (
    MessageRequest,
    MessageTool,
    MessageToolChoice,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from server.api.protocol import StreamOptions
from server.api.response_items import FunctionCallInput, FunctionCallOutput, InputMessage
from server.api.response_request import ResponseRequest
from server.api.text_request import DetokenizeRequest, TokenizeRequest

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "api.md").read_text("utf-8")
BODIES: list[type[BaseModel]] = [
    CompletionRequest, ChatCompletionRequest, ChatMessage, EmbeddingRequest, StreamOptions, TokenizeRequest,
    DetokenizeRequest, ResponseRequest, InputMessage, FunctionCallInput, FunctionCallOutput,
    MessageRequest, Turn, TextBlock, ToolUseBlock, ToolResultBlock, MessageTool, MessageToolChoice,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_field_has_a_row(body: type[BaseModel]) -> None:
    rows = "\n".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| "))
    known = set(re.findall(r"`(\w+)`", rows)) | {"role", "content", "type", "id", "status"}
    assert not body.model_fields.keys() - known


def test_every_endpoint_has_a_row(bench: Any) -> None:
    paths = bench.client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if f"`{path}`" not in PAGE]


@pytest.mark.parametrize("name", ["api.md", "features.md"])
def test_every_test_that_is_named_exists(name: str) -> None:
    page = (REPOSITORY / "docs" / name).read_text("utf-8")
    named = set(re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", page))
    assert len(named) > 30
    for file, function in named:
        source = (REPOSITORY / "tests" / "server" / file).read_text("utf-8")
        assert not function or f"def {function}(" in source, f"{file}::{function}"


def test_the_default_template_is_quoted_as_it_is() -> None:
    from server.tokenizer import DEFAULT_CHAT_TEMPLATE

    quoted = "\n".join(line[4:] for line in PAGE.splitlines() if line.startswith("    {"))
    assert quoted == DEFAULT_CHAT_TEMPLATE
