"""JSON of a model folder that may be damaged or hostile: bounded in size, no name twice, no crash by nesting.

Not what the JSON means. Python's reader keeps the last of two equal names and ends deep nesting with RecursionError.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spq.errors import ModelFileError

MAX_BYTES = 16 << 20  # Python's objects may take thirty times as much; a header of 10,000 tensors has 1.5 MB


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ModelFileError naming the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ModelFileError(f"{path}: {error}") from error
    return parse_json_object(raw, path)


def parse_json_object(raw: bytes, path: Path) -> dict[str, Any]:
    """The object in bytes that were read from `path`. Raises ModelFileError naming the file."""
    if len(raw) > MAX_BYTES:
        raise ModelFileError(f"{path}: more than {MAX_BYTES} bytes of JSON, which no model needs")
    try:
        data = json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise ModelFileError(f"{path}: not a JSON object")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"{twice!a} stands in it twice")
    return found
