"""Tools as chat requests spell them: the functions offered, which of them may or must be called, calls in the history.

Not what becomes of them (`server.api.tool_use`), and not how /v1/responses spells them (`server.api.response_tools`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.fields import Text

MAX_TOOLS = 128
FUNCTION_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())


class Function(_Strict):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
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

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    arguments: Text  # a JSON object
    parsed_arguments: Any = None  # the openai clients' reading of `arguments`, sent back with it


class ToolCall(_Strict):
    """A call in the history; `index` is its place in the stream that it came from."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"]
    function: CalledFunction
    index: Annotated[int, Field(ge=0)] | None = None


class AllowedFunctions(_Strict):
    """Some of the functions; the prompt still tells of all."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(_Strict):
    """OpenAI's `allowed_tools`."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools
