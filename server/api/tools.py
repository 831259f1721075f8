"""Tools of a chat request: the functions offered, calls and results in the history, and what of them the model is told.

Not how a family of models writes calls (`server.api.tool_formats`), nor reading them from an answer
(`server.api.tool_answers`). A call that is forced, and one of a `strict` function, is written under a grammar, so that
its arguments always follow the schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.fields import Text
from server.api.tool_formats import FORMATS, Tool, ToolFormat, detect, knows_tools
from server.engine.notation import Constraint, schema_rule
from server.errors import BadRequest
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.api.chat_request import ChatCompletionRequest, ChatMessage
    from server.service import Service

MAX_TOOLS = 128
ANY_OBJECT: dict[str, Any] = {"type": "object"}
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class Function(_Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema; None: any object
    strict: bool | None = None


class FunctionTool(_Strict):
    """A tool; OpenAI's other types are not served."""

    type: Literal["function"]
    function: Function


class FunctionName(_Strict):
    """Which function."""

    name: str


class NamedTool(_Strict):
    """The function that has to be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(_Strict):
    """A call that the assistant made."""

    name: Annotated[str, Field(pattern=_NAME)]
    arguments: Text  # a JSON object
    parsed_arguments: Any = None  # the openai clients' reading of `arguments`, sent back with it


class ToolCall(_Strict):
    """A call in the history; `index` is its place in the stream that it came from."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"]
    function: CalledFunction
    index: Annotated[int, Field(ge=0)] | None = None


Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request's answers may call."""

    form: ToolFormat
    names: frozenset[str]
    constraint: Constraint | None  # of the whole answer, where calls are forced or a function is strict
    shows_control: bool  # calls are marked by a control token, which therefore has to be shown


def tool_format(service: Service, tokenizer: Tokenizer) -> ToolFormat:
    """The operator's choice, or what the chat template shows."""
    chosen = service.config.tool_format
    return detect(tokenizer.chat_template) if chosen == "auto" else FORMATS[chosen]


def tool_use(body: ChatCompletionRequest, form: ToolFormat, tokenizer: Tokenizer) -> ToolUse | None:
    """None where the answer cannot call anything. Raises BadRequest for a choice that does not go with the tools."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice asks for a call, but there are no tools", param="tool_choice")
        return None
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise BadRequest("two tools have the same name", param="tools")
    if choice == "none":
        return None
    parallel = body.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise BadRequest(f"tool_choice names {choice.function.name!r}, which is no tool of this request",
                             param="tool_choice")  # fmt: skip
        parallel = False
    forced = choice == "required" or isinstance(choice, NamedTool)
    text = None
    if forced:
        text = form.forced([_tool(function, True) for function in functions], parallel=parallel)
    elif not parallel or any(function.strict for function in functions):
        mark_ids = tokenizer.encode(form.opening, add_special_tokens=False) if form.is_control else []
        offered = [_tool(function, bool(function.strict)) for function in functions]
        text = form.optional(offered, parallel=parallel, mark_id=mark_ids[0] if len(mark_ids) == 1 else None)
    constraint = None if text is None else Constraint("grammar", text, "tools")
    return ToolUse(form, frozenset(names), constraint, form.is_control and not forced)


def _tool(function: Function, strict: bool) -> Tool:
    schema = function.parameters if strict and function.parameters else ANY_OBJECT
    return Tool(function.name, schema_rule(Constraint("json_schema", json.dumps(schema, ensure_ascii=False), "tools")))


def to_template(
    messages: Sequence[ChatMessage], tools: Sequence[FunctionTool] | None, template: str, form: ToolFormat
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages and variables of a chat template. One that knows no tools gets them in words, in messages.

    The newer name `developer` is `system` to chat templates.
    """
    offered = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools or ()]
    native = knows_tools(template)
    called: dict[str, str] = {}  # name of each call, by id
    plain: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        turn: dict[str, Any] = {"role": role, "content": message.content or ""}
        if message.name:
            turn["name"] = message.name
        if message.tool_calls:
            called |= {call.id: call.function.name for call in message.tool_calls}
            calls = [(call, _arguments(call, i, k)) for k, call in enumerate(message.tool_calls)]
            if native:
                turn["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.function.name, "arguments": arguments},
                    }
                    for call, arguments in calls
                ]
            else:
                turn["content"] += form.write([(call.function.name, arguments) for call, arguments in calls])
        if message.role == "tool":
            name = message.name or called.get(message.tool_call_id or "", "")
            if native:
                turn |= {"tool_call_id": message.tool_call_id, "name": name}
            else:
                turn = {"role": "user", "content": f"{name or 'The function'} returned: {turn['content']}"}
        plain.append(turn)
    if not offered:
        return plain, {}
    if native:
        return plain, {"tools": offered}
    told = form.instructions(offered)
    if plain[0]["role"] == "system":
        plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}
        return plain, {}
    return [{"role": "system", "content": told}, *plain], {}


def _arguments(call: ToolCall, message: int, place: int) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"messages[{message}].tool_calls[{place}].function.arguments"
        raise BadRequest(f"{param} is no JSON object", param=param)
    return arguments
