"""The access log: one line a request, as text or as JSON, without anything of prompts, answers or keys.

`server.cli` says where the lines go. Values that a client chose are escaped, so that none can begin a line.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

from server.api.record import RequestRecord

LOGGER = "server.access"
PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds: logged only at --log-level debug
QUIET = (200, 503)


class AccessLog:
    """Writes the record of a request that has ended."""

    def __init__(self, form: Literal["text", "json", "off"]) -> None:
        self._form = form
        self._logger = logging.getLogger(LOGGER)

    def __call__(self, record: RequestRecord) -> None:
        """One line, or none."""
        level = logging.DEBUG if record.path in PROBES and record.status in QUIET else logging.INFO
        if self._form == "off" or not self._logger.isEnabledFor(level):
            return
        self._logger.log(level, "%s", as_json(record) if self._form == "json" else as_text(record))


def as_text(record: RequestRecord) -> str:
    """Method, path, status, time, id; then what a completion used."""
    line = (
        f"{record.method} {ascii(record.path)[1:-1]} {record.status} "
        f"{1000 * (record.ended_s - record.started_s):.1f} ms {record.request_id}"
    )
    if record.phases is not None:
        line += f" {record.prompt_tokens}+{record.completion_tokens} tokens"
    return line if record.key is None else f"{line} {record.key}"


def as_json(record: RequestRecord) -> str:
    """One object; times in milliseconds, null where a phase was not reached."""
    phases = record.phases
    return json.dumps(
        {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": record.request_id,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "error": record.error,
            "key": record.key,
            "model": record.model,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "finish_reasons": record.finish_reasons,
            "duration_ms": _ms(record.ended_s - record.started_s),
            "queue_ms": None if phases is None else _ms(phases.queue_s),
            "prefill_ms": None if phases is None else _ms(phases.prefill_s),
            "decode_ms": None if phases is None else _ms(phases.decode_s),
        }
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)
