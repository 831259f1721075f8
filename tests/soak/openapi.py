"""`python -m tests.soak.openapi --cases 400`: requests made from the OpenAPI document, to a real server.

Right and wrong ones, for every operation. No answer may be a 500 or of a shape that the document does not have,
and the server must answer afterwards as before. `tests/server/api/test_openapi_fuzz.py` does a few of the same in the
test suite, without a model.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.soak.target import MODEL, finish, grown, serving
from tests.soak.traffic import ask, body

CHECKS = [
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
SLACK_MIB = 64.0  # of grammars and conversations that are kept, both bounded


HOW: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}
asked: Counter[int] = Counter()  # answers by status


def check(case: Any) -> None:
    """Send one request, to a model that is there, and hold the answer against the document."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL
    asked[case.call_and_validate(checks=CHECKS, timeout=60).status_code] += 1


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.openapi", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=400, help="per operation and kind, right and wrong")
    arguments = parser.parse_args()
    wrong: list[str] = []
    fixed = body(random.Random(9), 8, temperature=0)
    with serving("--max-num-seqs", "16") as target:
        first, before, begun = asyncio.run(ask(target.port, fixed)), target.settled(), time.monotonic()
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{target.port}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()
            modes = [GenerationMode.POSITIVE] if operation.body or operation.path_parameters else []
            modes += [GenerationMode.NEGATIVE] if operation.body else []
            for mode in modes:
                case = operation.as_strategy(generation_mode=mode)
                try:
                    settings(max_examples=arguments.cases, **HOW)(given(case=case)(check))()
                except Exception as error:
                    wrong.append(f"{operation.label}, {mode.value}: {str(error)[:2000]}")
            if not modes:
                check(operation.Case())
        spent = time.monotonic() - begun
        last, after = asyncio.run(ask(target.port, fixed)), target.settled()
    if not first.text or first.text != last.text:
        wrong.append("the same greedy request was answered otherwise afterwards")
    wrong += grown(before, after, SLACK_MIB)
    figures = {"seconds": round(spent, 1), "requests": asked.total(), "by_status": dict(asked)}
    return finish("openapi", {**figures, "before": before, "after": after}, wrong)


if __name__ == "__main__":
    sys.exit(main())
