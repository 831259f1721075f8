"""Tools in use: what the model is told of them, how its answers may call, and the calls of the history in its template.

Not the fields of requests (`server.api.tools`), nor how a family of models writes calls (`server.api.tool_formats`). A
call that is forced, and one of a `strict` function, is written under a grammar, so that its arguments always follow the
schema.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.api.call_format import ANY_OBJECT, Tool, ToolFormat
from server.api.tool_formats import FORMATS, detect, knows_tools
from server.api.tool_parser import ToolParser
from server.api.tools import AllowedTools, Function, FunctionTool, NamedTool, ToolCall
from server.engine.notation import Constraint, schema_rule
from server.errors import BadRequest
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.api.chat_request import ChatCompletionRequest, ChatMessage
    from server.service import Service


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How one request's answers may call."""

    form: ToolFormat
    names: frozenset[str]
    constraint: Constraint | None  # of the whole answer, where calls are forced, a function is strict, the text has one

    @property
    def shows_control(self) -> bool:
        """Calls are marked by a control token, which therefore has to be shown."""
        return bool(self.form.control_marks)

    def parser(self) -> ToolParser:
        """For one answer."""
        return self.form.parser(self.names)

    def new_call_id(self) -> str:
        """An id that the model's template takes."""
        token = uuid.uuid4().hex
        return f"call_{token[:24]}" if self.form.call_id_chars is None else token[: self.form.call_id_chars]


def tool_format(service: Service, tokenizer: Tokenizer) -> ToolFormat:
    """The operator's choice, or what the chat template shows."""
    chosen = service.config.tool_format
    return detect(tokenizer.chat_template) if chosen == "auto" else FORMATS[chosen]


def tool_use(
    body: ChatCompletionRequest, form: ToolFormat, tokenizer: Tokenizer, text: Constraint | None = None
) -> ToolUse | None:
    """None where the answer cannot call anything. `text` is what it must match where it calls nothing.

    Raises BadRequest for a choice that does not go with the tools, or a `text` that is not JSON by a schema.
    """
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice asks for a call, but there are no tools", param="tool_choice")
        return None
    functions = {tool.function.name: tool.function for tool in body.tools}
    if len(functions) < len(body.tools):
        raise BadRequest("two tools have the same name", param="tools")
    if choice == "none":
        return None
    if text is not None and text.kind != "json_schema":
        raise BadRequest(
            f"{text.param} and tools exclude each other; beside tools, a text can only be JSON by a schema",
            param=text.param,
        )
    forced, named = choice == "required", list(functions)
    if isinstance(choice, NamedTool):
        forced, named = True, [choice.function.name]
    elif isinstance(choice, AllowedTools):
        forced = choice.allowed_tools.mode == "required"
        named = list(dict.fromkeys(tool.function.name for tool in choice.allowed_tools.tools))
    for name in named:
        if name not in functions:
            raise BadRequest(f"tool_choice names {name!r}, which is no tool of this request", param="tool_choice")
    chosen = [functions[name] for name in named]
    parallel = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    restricted = not parallel or len(chosen) < len(functions) or any(function.strict for function in chosen)
    tools = [_tool(function, forced or bool(function.strict)) for function in chosen]
    controls = _controls(form, tokenizer)
    grammar = None
    if forced:
        grammar = form.forced(tools, parallel=parallel, controls=controls)
    elif restricted or text is not None:
        rule = None if text is None else schema_rule(text)
        grammar = form.optional(tools, parallel=parallel, controls=controls, text=rule)
    return ToolUse(form, frozenset(named), None if grammar is None else Constraint("grammar", grammar, "tools"))


def _tool(function: Function, strict: bool) -> Tool:
    return Tool(function.name, function.parameters if strict and function.parameters else ANY_OBJECT)


def _controls(form: ToolFormat, tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of those of a format's marks that are tokens of their own."""
    ids = {mark: tokenizer.encode(mark, add_special_tokens=False) for mark in form.control_marks}
    return {mark: found[0] for mark, found in ids.items() if len(found) == 1}


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
