"""`tools` and `tool_choice` of /v1/responses, which spells them flat, as a chat's.

OpenAI's own tools are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.api.fields import Text, not_served
from server.api.protocol import Absent, Off, Strict, of_kind
from server.api.tools import (
    FUNCTION_NAME,
    MAX_TOOLS,
    AllowedFunctions,
    AllowedTools,
    Function,
    FunctionName,
    FunctionTool,
    NamedTool,
    ToolChoice,
)


class ResponseFunction(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Off = None
    output_schema: Absent = None
    allowed_callers: Annotated[Any, not_served(["direct"])] = None

    def to_chat(self) -> FunctionTool:
        """As chats have it."""
        function = Function(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return FunctionTool(type="function", function=function)


class NamedFunction(Strict):
    """The function that has to be called, or one that may."""

    type: Literal["function"]
    name: str

    def to_chat(self) -> NamedTool:
        """As chats have it."""
        return NamedTool(type="function", function=FunctionName(name=self.name))


class AllowedChoice(Strict):
    """Some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]

    def to_chat(self) -> AllowedTools:
        """As chats have it."""
        allowed = AllowedFunctions(mode=self.mode, tools=[tool.to_chat() for tool in self.tools])
        return AllowedTools(type="allowed_tools", allowed_tools=allowed)


_TOOLS: dict[Any, type[Strict]] = {"function": ResponseFunction}
_CHOICES: dict[Any, type[Strict]] = {"function": NamedFunction, "allowed_tools": AllowedChoice}


def _tool(value: Any) -> Any:
    return of_kind(value, _TOOLS, "tools")


def _choice(value: Any) -> Any:
    return of_kind(value, _CHOICES, "choices")


ResponseTools = Annotated[list[Annotated[ResponseFunction, BeforeValidator(_tool)]], Field(max_length=MAX_TOOLS)]
ResponseToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedFunction | AllowedChoice, BeforeValidator(_choice)
]


def to_chat_choice(choice: ResponseToolChoice | None) -> ToolChoice | None:
    """As chats have it."""
    return choice if choice is None or isinstance(choice, str) else choice.to_chat()
