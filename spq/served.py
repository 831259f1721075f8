"""A running OpenAI-compatible server as a source of scores: /v1/completions with echo, logprobs and no new tokens.

Made for this project's server, whose /tokenize and /v1/models it uses too. A server gives the log-probability of each
token of the text and its best candidate, not all logits: perplexity and top-1 agreement come out of that, KL does not.
Standard library only, one connection a request, none through a proxy.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from spq.errors import RemoteError

REQUEST_TOKENS = 4096  # per request, of windows together
RETRIES = 5
MAX_WAIT_S = 30.0
TIMEOUT_S = 600.0
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ServedScores:
    """What a server says of windows [count, window]."""

    nll: float  # summed over all tokens but each window's first, nats
    best: list[list[str]]  # the most likely token at each of those positions, as the server spells it


class ServedModel:
    """One model behind a URL. Every method raises RemoteError, in one line that names the URL."""

    def __init__(self, url: str, *, api_key: str | None = None, concurrency: int = 4) -> None:
        """Ask what is served there. `url` with or without its /v1."""
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RemoteError(f"{url}: not a URL of a server; give one as http://localhost:8000")
        self.url = parts.geturl()
        self._host, self._path, self._secure = parts.netloc, parts.path, parts.scheme == "https"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.api_key = api_key
        self.concurrency = concurrency
        try:
            card = self._ask("GET", "/v1/models")["data"][0]
            self.name: str = card["id"]
            self.context: int = card["max_model_len"]
        except (KeyError, IndexError, TypeError) as error:
            raise RemoteError(f"{self.url}: /v1/models names no model with its max_model_len") from error
        memory = (card.get("spq") or {}).get("memory_bytes") or {}
        known = "weights" in memory
        self.resident_bytes = int(memory["weights"] + memory.get("low_rank", 0)) if known else None

    def tokenize(self, text: str) -> Tensor:
        """Token ids int64 [n] without special tokens."""
        answer = self._ask("POST", "/tokenize", {"model": self.name, "prompt": text, "add_special_tokens": False})
        return torch.tensor(answer["tokens"], dtype=torch.int64)

    def score(self, windows: Tensor) -> ServedScores:
        """Score windows int64 [count, window], several requests at a time."""
        rows = windows.tolist()
        per_request = max(1, REQUEST_TOKENS // windows.shape[1])
        groups = [rows[start : start + per_request] for start in range(0, len(rows), per_request)]
        choices = [choice for found in self._all(self._echo, groups) for choice in found]
        nll = 0.0
        best: list[list[str]] = []
        for row, choice in zip(rows, choices, strict=True):
            values, tops = choice["token_logprobs"], choice["top_logprobs"]
            if len(values) != len(row) or any(value is None for value in values[1:]):
                raise RemoteError(f"{self.url}: {len(values)} log-probabilities for a prompt of {len(row)} tokens")
            nll -= sum(values[1:])
            best.append([max(top, key=top.__getitem__) for top in tops[1:]])
        return ServedScores(nll, best)

    def spelled(self, token_ids: Sequence[int]) -> dict[int, str]:
        """How this server spells tokens in its logprobs."""
        distinct = sorted(set(token_ids))
        size = min(self.context, REQUEST_TOKENS)
        groups = [[distinct[start : start + size]] for start in range(0, len(distinct), size)]
        tokens = [token for [choice] in self._all(self._echo, groups) for token in choice["tokens"]]
        return dict(zip(distinct, tokens, strict=True))

    def _echo(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """The logprobs of each prompt."""
        body = {"model": self.name, "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1}
        answer = self._ask("POST", "/v1/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            found = [choice["logprobs"] for choice in choices]
            if len(found) != len(prompts) or not all(isinstance(part["tokens"], list) for part in found):
                raise KeyError("logprobs")
        except (KeyError, TypeError) as error:
            raise RemoteError(f"{self.url}: /v1/completions gave no logprobs for {len(prompts)} prompts") from error
        return found

    def _all(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`work` on each item, a few at a time, results in order; the first error ends the rest."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One JSON answer. A full queue or a lost connection is tried again, later and later."""
        problem = ""
        for attempt in range(RETRIES):
            try:
                status, headers, data = self._send(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                problem, wait_s = f"{type(error).__name__}: {error}", 0.25 * 2**attempt
            else:
                if status == 200:
                    return _parse(data, f"{self.url}{path}")
                problem, wait_s = f"{status}: {_message(data)}", 0.5 * 2**attempt
                if status not in (429, 500, 502, 503, 504):
                    break
                asked = headers.get("Retry-After") or ""
                wait_s = max(wait_s, float(asked)) if asked.isdigit() else wait_s
            if attempt + 1 < RETRIES:
                time.sleep(min(wait_s, MAX_WAIT_S))
        raise RemoteError(f"{self.url}{path}: {problem}")

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any, bytes]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, timeout=TIMEOUT_S)
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise RemoteError(f"{where}: the answer is no JSON") from error


def _message(data: bytes) -> str:
    """The message of OpenAI's error body, or the beginning of whatever came, in one line."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(data[:200].decode("utf-8", "replace").split())
