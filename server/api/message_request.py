"""The bodies of POST /v1/messages and its count_tokens, Anthropic's form of a chat. They become chat requests.

Turns are made of blocks: texts, calls of tools, and their results. Other blocks (images, documents, thinking, calls of
Anthropic's own tools) are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from server.api.chat_request import ChatCompletionRequest, ChatMessage
from server.api.fields import PositiveTokenCount, Stop, Temperature, Text, TopK, TopP, check_text, not_served
from server.api.protocol import Absent, NoneListed, Off, PromptOptions, Strict, of_kind, refusal
from server.api.tools import (
    FUNCTION_NAME,
    MAX_TOOLS,
    CalledFunction,
    Function,
    FunctionName,
    FunctionTool,
    NamedTool,
    ToolCall,
    ToolChoice,
)

BlockId = Annotated[str, Field(min_length=1, max_length=256)]
CacheControl = dict[str, Any] | None  # a hint: prefixes are found in the cache without it


def _check_input(value: dict[str, Any]) -> dict[str, Any]:
    check_text(json.dumps(value, ensure_ascii=False))
    return value


class TextBlock(Strict):
    """A text."""

    type: Literal["text"]
    text: Text
    cache_control: CacheControl = None
    citations: NoneListed = None


class ToolUseBlock(Strict):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: BlockId
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    input: Annotated[dict[str, Any], AfterValidator(_check_input)]
    cache_control: CacheControl = None
    caller: Annotated[Any, not_served({"type": "direct"})] = None
    toolset_name: Absent = None


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _text_block(value: Any) -> Any:
    return of_kind(value, {"text": TextBlock}, "blocks")


Texts = Annotated[list[Annotated[TextBlock, BeforeValidator(_text_block)]], BeforeValidator(_as_blocks)]


class ToolResultBlock(Strict):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: BlockId
    content: Texts | None = None
    is_error: bool | None = None  # the text says what went wrong; templates know no other place for it
    cache_control: CacheControl = None
    toolset_name: Absent = None


_BLOCKS: dict[Any, type[Strict]] = {"text": TextBlock, "tool_use": ToolUseBlock, "tool_result": ToolResultBlock}


def _block(value: Any) -> Any:
    return of_kind(value, _BLOCKS, "blocks")


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, BeforeValidator(_block)]


class Turn(Strict):
    """One turn of the conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[list[Block], BeforeValidator(_as_blocks)]

    def to_chat(self) -> list[ChatMessage]:
        """Results of calls are messages of their own in a chat, before what the user says beside them."""
        results = [
            ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=_join(block.content or []))
            for block in self.content
            if isinstance(block, ToolResultBlock)
        ]
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        calls = [
            ToolCall(
                id=block.id,
                type="function",
                function=CalledFunction(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False)),
            )
            for block in self.content
            if isinstance(block, ToolUseBlock)
        ]
        if results and not texts and not calls:
            return results
        said = _join(texts) if texts or not calls else None
        return [*results, ChatMessage(role=self.role, content=said, tool_calls=calls or None)]


class MessageTool(Strict):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl = None
    defer_loading: Off = None
    eager_input_streaming: bool | None = None  # arguments are always streamed as they come
    input_examples: NoneListed = None
    allowed_callers: Annotated[Any, not_served(["direct"])] = None

    def to_chat(self) -> FunctionTool:
        """As chats have it."""
        function = Function(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return FunctionTool(type="function", function=function)


def _tool(value: Any) -> Any:
    return of_kind(value, {None: MessageTool, "custom": MessageTool}, "tools")


class MessageToolChoice(Strict):
    """Which tools may or must be called; `any` is one of them, `tool` the one of that name."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def to_chat(self) -> ToolChoice:
        """As chats have it."""
        if self.type == "tool":
            return NamedTool(type="function", function=FunctionName(name=self.name or ""))
        return "required" if self.type == "any" else self.type


class CountRequest(PromptOptions):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    system: Texts | None = None
    tools: Annotated[list[Annotated[MessageTool, BeforeValidator(_tool)]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessageToolChoice | None = None

    # without influence on the answer
    metadata: dict[str, Any] | None = None
    cache_control: CacheControl = None
    user_profile_id: str | None = None
    workspace_id: str | None = None

    # known, not served
    thinking: Annotated[Any, not_served({"type": "disabled"})] = None
    output_config: Annotated[Any, not_served({})] = None
    output_format: Absent = None
    service_tier: Annotated[Any, not_served("auto", "standard_only")] = None
    container: Absent = None
    context_management: Absent = None
    mcp_servers: NoneListed = None
    inference_geo: Absent = None
    speed: Annotated[Any, not_served("standard")] = None
    diagnostics: Absent = None

    @model_validator(mode="after")
    def _blocks_go_with_their_roles(self) -> CountRequest:
        wrong = {"user": ToolUseBlock, "assistant": ToolResultBlock}
        for i, turn in enumerate(self.messages):
            for k, block in enumerate(turn.content):
                if isinstance(block, wrong[turn.role]):
                    raise refusal(f"messages[{i}].content[{k}].type", f"the {turn.role} makes no {block.type} blocks")
        return self

    def to_chat(self, **sampling: Any) -> ChatCompletionRequest:
        """The same as a chat. An assistant's last turn that calls nothing is gone on with."""
        system = [] if self.system is None else [ChatMessage(role="system", content=_join(self.system))]
        turns = [message for turn in self.messages for message in turn.to_chat()]
        continued = turns[-1].role == "assistant" and not turns[-1].tool_calls
        choice = self.tool_choice
        return ChatCompletionRequest(
            model=self.model,
            messages=[*system, *turns],
            continue_final_message=continued,
            tools=None if self.tools is None else [tool.to_chat() for tool in self.tools],
            tool_choice=None if choice is None else choice.to_chat(),
            parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
            **{name: getattr(self, name) for name in PromptOptions.model_fields},
            **sampling,
        )


class MessageRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: PositiveTokenCount
    stream: bool | None = None
    stop_sequences: Stop = Field(default_factory=list)
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None

    def to_chat(self, **sampling: Any) -> ChatCompletionRequest:
        """The same as a chat."""
        return super().to_chat(
            max_tokens=self.max_tokens,
            stop=self.stop_sequences,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            **sampling,
        )


def _join(blocks: Sequence[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)
