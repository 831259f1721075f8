"""The ways of writing calls that are known here, and which of them a chat template shows.

Each family of models was trained on one of its own; a model without one is told of the plain JSON form in a message.
"""

from __future__ import annotations

import re

from server.api.call_format import ToolFormat
from server.api.json_calls import JsonCalls
from server.api.named_calls import ARGS, CALL_ID, NamedCalls
from server.api.pythonic_calls import PythonicCalls

PYTHON_TAG, TOOL_CALLS = "<|python_tag|>", "[TOOL_CALLS]"
MISTRAL_ID_CHARS = 9  # its templates refuse ids of another length
FORMATS: dict[str, ToolFormat] = {
    form.name: form
    for form in (
        JsonCalls("json", bare="{[", brackets=("[", "]")),
        JsonCalls("hermes", "<tool_call>\n", "\n</tool_call>", separator="\n"),
        JsonCalls("llama3", PYTHON_TAG, "", (PYTHON_TAG,), "{[", arguments="parameters", separator="; "),
        JsonCalls("mistral", TOOL_CALLS, "", (TOOL_CALLS,), "{[", MISTRAL_ID_CHARS, brackets=("[", "]")),
        NamedCalls("mistral11", TOOL_CALLS, "", (TOOL_CALLS, CALL_ID, ARGS), "", MISTRAL_ID_CHARS),
        PythonicCalls("pythonic", PYTHON_TAG, "", (PYTHON_TAG,), "["),
    )
}
NAMES = tuple(FORMATS)


def detect(template: str) -> ToolFormat:
    """The format that a chat template writes; plain JSON where it writes none that is known here."""
    if TOOL_CALLS in template:
        return FORMATS["mistral11" if ARGS in template else "mistral"]
    if "<tool_call>" in template:
        return FORMATS["hermes"]
    if re.search(r"\[func_name1\(", template):
        return FORMATS["pythonic"]
    if PYTHON_TAG in template or re.search(r'\{"name": function name, "parameters"', template):
        return FORMATS["llama3"]
    return FORMATS["json"]


def knows_tools(template: str) -> bool:
    """Whether a chat template shows the model which tools there are."""
    return re.search(r"\btools\b", template) is not None
