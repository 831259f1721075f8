"""What requests may say about the text of an answer, in OpenAI's form and in vLLM's, read into one constraint.

Not the compiling and matching (`server.engine.structured`). At most one of the fields may ask for something; what it
asks for holds from the first token of the answer to its end.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields import Text, not_served
from server.core import Grammar
from server.engine.notation import WHITE_SPACE, Constraint, Kind
from server.errors import BadRequest

if TYPE_CHECKING:
    from server.api.protocol import GenerationBody
    from server.service import Service

ANY_OBJECT = json.dumps({"type": "object"})
MAX_CHOICES = 1024
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"

JsonObject = dict[str, Any]


def _check_schema(value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise PydanticCustomError("schema_type", "must be a JSON schema: an object, or a string that holds one")
    return value


_SCHEMA_TYPES = {"anyOf": [{"type": "object"}, {"type": "string"}]}
SchemaOrText = Annotated[Any, AfterValidator(_check_schema), WithJsonSchema(_SCHEMA_TYPES)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=(), populate_by_name=False)


class JsonSchemaFormat(_Strict):
    """OpenAI's `json_schema`. The schema holds whether `strict` is true or not."""

    name: Annotated[str, Field(pattern=_NAME)]
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "json_schema", "type json_schema goes with a json_schema, and other types without", {}
            )
        return self


class TextFormat(_Strict):
    """`text.format` of /v1/responses: the same, flat."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=_NAME)] | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> TextFormat:
        parts = (self.name is not None, self.schema_ is not None)
        if parts != ((True, True) if self.type == "json_schema" else (False, False)):
            raise PydanticCustomError(
                "text_format", "type json_schema goes with a name and a schema, and other types without", {}
            )
        return self

    def to_response_format(self) -> ResponseFormat:
        """As chats have it."""
        if self.name is None or self.schema_ is None:
            return ResponseFormat(type=self.type)
        return ResponseFormat(type=self.type, json_schema=JsonSchemaFormat(name=self.name, schema=self.schema_))


class TextOptions(_Strict):
    """`text` of /v1/responses."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, not_served("medium")] = None


class StructuredOutputs(_Strict):
    """vLLM's `structured_outputs`: one kind of constraint."""

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: Text | None = None
    disable_fallback: bool | None = None  # nothing falls back here
    disable_additional_properties: Annotated[Any, not_served(False)] = None
    structural_tag: Annotated[Any, not_served()] = None

    @model_validator(mode="after")
    def _one_kind(self) -> StructuredOutputs:
        kinds = [self.json_, self.regex, self.choice, self.grammar, self.json_object or None]
        if sum(kind is not None for kind in kinds) != 1:
            raise PydanticCustomError(
                "structured_outputs", "give exactly one of json, regex, choice, grammar and json_object: true", {}
            )
        return self


async def compile_constraint(body: GenerationBody, service: Service, tools: Constraint | None = None) -> Grammar | None:
    """What the answer's text must match, compiled; None where it may be anything.

    `tools` is what calls of tools ask for; it holds what the body asks for besides.

    Raises BadRequest for more than one constraint, or for one that cannot be used; Overloaded.
    """
    text = text_constraint(body)
    asked = text if tools is None else tools
    if asked is None:
        return None
    if body.ignore_eos:
        raise BadRequest(
            f"ignore_eos and {asked.param} exclude each other: text that must match also has to end",
            param="ignore_eos",
        )
    if text is not None and asked is not text:
        await service.grammars.compile(text)  # alone, so that what is wrong with it is said of it
    return await service.grammars.compile(asked)


def text_constraint(body: GenerationBody) -> Constraint | None:
    """What the body asks for, tools aside.

    Raises BadRequest for more than one thing, and for a schema in a string that is no JSON object.
    """
    found = _constraints(body)
    if len(found) > 1:
        names = " and ".join(constraint.param for constraint in found)
        raise BadRequest(f"{names} exclude each other; send one of them", param=found[1].param)
    return found[0] if found else None


def _constraints(body: GenerationBody) -> list[Constraint]:
    found: list[Constraint] = []
    asked = body.response_format
    if asked is not None and asked.json_schema is not None:
        found.append(_of("json_schema", asked.json_schema.schema_, "response_format.json_schema.schema"))
    elif asked is not None and asked.type == "json_object":
        found.append(Constraint("json_schema", ANY_OBJECT, "response_format"))
    if (outputs := body.structured_outputs) is not None:
        white_space = outputs.whitespace_pattern or WHITE_SPACE
        if outputs.disable_any_whitespace:
            white_space = ""
        if outputs.json_object:
            found.append(Constraint("json_schema", ANY_OBJECT, "structured_outputs.json_object", white_space))
        found += [
            _of(kind, value, f"structured_outputs.{name}", white_space)
            for kind, name, value in _kinds(outputs.json_, outputs.regex, outputs.choice, outputs.grammar)
        ]
    older = _kinds(body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    return found + [_of(kind, value, f"guided_{name}") for kind, name, value in older]


def _kinds(schema: Any, regex: Any, choice: Any, grammar: Any) -> list[tuple[Kind, str, Any]]:
    kinds: list[tuple[Kind, str, Any]] = [
        ("json_schema", "json", schema),
        ("regex", "regex", regex),
        ("choice", "choice", choice),
        ("grammar", "grammar", grammar),
    ]
    return [kind for kind in kinds if kind[2] is not None]


def _of(kind: Kind, value: Any, param: str, white_space: str = WHITE_SPACE) -> Constraint:
    if kind == "json_schema" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadRequest(f"{param} is a string, but not one of JSON: {error}", param=param) from error
        if not isinstance(value, dict):
            raise BadRequest(f"{param} holds no JSON object", param=param)
    text = value if isinstance(value, str) else _to_json(value, param)
    return Constraint(kind, text, param, white_space)


def _to_json(value: Any, param: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (RecursionError, UnicodeEncodeError) as error:
        raise BadRequest(f"{param} is nested too deeply, or holds a lone surrogate", param=param) from error
    return text
