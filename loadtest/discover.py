"""What a server says of itself over HTTP: the name of its model, whose it is, its metrics.

The standard library alone, so that locust's patched sockets serve it as well.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(\{.*\})? ([^ ]+)( \d+)?$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# owned_by of /v1/models of servers that take ignore_eos, which is no field of OpenAI's
TAKES_IGNORE_EOS = ("spq-serve", "vllm", "llamacpp")


class NoServer(RuntimeError):
    """The address does not answer as an OpenAI-compatible server does."""


@dataclass(frozen=True, slots=True)
class Found:
    """The first model of a server."""

    model: str
    owner: str

    @property
    def takes_ignore_eos(self) -> bool:
        """Whether answers can be made to go on to their full length."""
        return self.owner in TAKES_IGNORE_EOS


def find_model(url: str, api_key: str | None = None, timeout_s: float = 10.0) -> Found:
    """The first entry of /v1/models. Raises NoServer with the reason."""
    try:
        listed: dict[str, Any] = json.loads(_get(f"{url}/v1/models", api_key, timeout_s))
        first = listed["data"][0]
        return Found(str(first["id"]), str(first.get("owned_by", "")))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise NoServer(f"{url}/v1/models: {type(error).__name__}: {error}") from error


def status_of(url: str, timeout_s: float = 10.0) -> int | None:
    """HTTP status of a GET; None where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


Samples = dict[tuple[str, str], float]  # (name, value of the label `kind` or "") -> sum over other labels


def read_metrics(url: str, api_key: str | None = None, timeout_s: float = 10.0) -> Samples:
    """Samples of /metrics; empty where a server has none."""
    try:
        text = _get(f"{url}/metrics", api_key, timeout_s).decode()
    except (OSError, ValueError):
        return {}
    found: Samples = {}
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if match:
            key = match[1], dict(LABEL.findall(match[2] or "")).get("kind", "")
            found[key] = found.get(key, 0.0) + float(match[3])
    return found


def memory_ledger(samples: Samples) -> dict[str, int]:
    """Bytes by kind of what the server holds, as our server counts them; empty of others."""
    return {
        kind: int(value) for (name, kind), value in samples.items() if name == "spq:memory_bytes" and kind != "free"
    }


def _get(url: str, api_key: str | None, timeout_s: float) -> bytes:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s) as answer:
        body: bytes = answer.read()
        return body
