"""Requests made from the OpenAPI document, right ones and wrong ones: no 500, and every answer as the document says.

Not the meaning of fields (`test_validation`, `test_parameters`). `tests/soak/openapi.py` does the same to a real
server, thousands of times.
"""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode

from tests.soak.openapi import CHECKS, HOW

CASES = 25  # per operation and mode; the examples of the document come first


def check(case: Any) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"  # one that is there
    case.call_and_validate(checks=CHECKS)


def test_every_operation_answers_as_its_document_says(bench: Any) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", bench.client.app)
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        seen.add(operation.label)
        wrong = [GenerationMode.NEGATIVE] if operation.body else []  # any text is a path, so none is a wrong one
        right = [GenerationMode.POSITIVE] if operation.body or operation.path_parameters else []
        for mode in (*right, *wrong):
            settings(max_examples=CASES, **HOW)(given(case=operation.as_strategy(generation_mode=mode))(check))()
        if not right:
            check(operation.Case())
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses", "GET /v1/models"} <= seen
