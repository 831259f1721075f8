"""The same numbers in process and through a real server, float32 on both sides; and servers that misbehave."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import spq.served
from spq.calibrate import bundled_calibration, read_text, tokenize
from spq.errors import OptionError, RemoteError
from spq.evaluate import cut_windows
from spq.judge import Judge
from spq.rows import TextScore
from spq.scoring import LocalModel
from spq.served import ServedModel
from spq.tasks import NEEDS, Tasks
from spq.texts import EvaluationText
from tests.spq.serving import ROOT, running_server

DEMO = ROOT / "demo" / "storyteller"
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # relative, of perplexities: float32 sums of another order; measured: 4e-8


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server(DEMO) as url:
        yield url


@pytest.fixture
def excerpt() -> EvaluationText:
    return EvaluationText("books", read_text(bundled_calibration())[5000:9000])


def _score(row: Any) -> TextScore:
    [score] = row.texts.values()
    assert isinstance(score, TextScore)
    return score


def test_perplexity_and_agreement_are_the_same_both_ways(server: str, excerpt: EvaluationText) -> None:
    reference = LocalModel(DEMO, CPU, torch.float32)
    judge = Judge([excerpt], CPU, torch.float32, reference, window=96, max_tokens=768)
    here, there = judge.folder(DEMO), judge.server(ServedModel(f"{server}/v1", concurrency=3))
    a, b = _score(here), _score(there)
    assert b.perplexity == pytest.approx(a.perplexity, rel=TOLERANCE)
    assert (b.num_tokens, b.protocol, b.base_perplexity) == (a.num_tokens, a.protocol, a.base_perplexity)
    assert a.top1 == 1.0 and b.top1 > 0.995  # type: ignore[operator]  # a tie may fall either way
    assert a.kl == 0.0 and b.kl is None and there.file_bytes is None and there.composite is None
    assert there.resident_bytes == pytest.approx(here.resident_bytes, rel=0.01)  # norms are float32 there
    alone = Judge([excerpt], CPU, torch.float32, window=96, max_tokens=768).server(ServedModel(server))
    assert _score(alone).nll == pytest.approx(b.nll, rel=1e-6) and _score(alone).top1 is None


def test_agreement_tells_models_apart(
    server: str, excerpt: EvaluationText, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    other = make_model(vocab_size=4096, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((DEMO / name).read_bytes())
    reference = LocalModel(other, CPU, torch.float32)
    found = Judge([excerpt], CPU, torch.float32, reference, window=96, max_tokens=768).server(ServedModel(server))
    assert _score(found).top1 < 0.2  # type: ignore[operator]


def test_the_server_tokenizes_and_spells_as_it_scores(server: str, excerpt: EvaluationText) -> None:
    model = ServedModel(server)
    ids = model.tokenize(excerpt.text)
    assert torch.equal(ids, tokenize(DEMO, excerpt.text)) and model.context == 1024
    spelled = model.spelled(ids.tolist())
    assert set(spelled) == set(ids.tolist()) and len(set(spelled.values())) == len(spelled)
    scores = model.score(cut_windows(ids, 64, max_tokens=200))
    assert [len(row) for row in scores.best] == [63] * 3 and scores.nll > 0


def test_a_refusal_is_one_line(server: str) -> None:
    with pytest.raises(RemoteError, match="outside the vocabulary") as caught:
        ServedModel(server).score(torch.tensor([[1, 999_999]]))
    assert "\n" not in str(caught.value) and server in str(caught.value)
    with pytest.raises(OptionError, match="BOS by URL"):
        Judge([EvaluationText("t", "one two " * 500)], CPU, torch.float32, bos=True, window=8).server(
            ServedModel(server)
        )


@pytest.mark.slow
def test_tasks_are_the_same_both_ways(server: str, tmp_path: Path) -> None:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} (the extra eval) not installed")
    questions = [("What flies?", "A bird.", "A stone."), ("What swims?", "A fish does.", "A house does, of course.")]
    truthful = [
        {"question": q, "mc1_targets": {yes: 1, no: 0}, "mc2_targets": {yes: 1, no: 0}} for q, yes, no in questions
    ]
    (tmp_path / "mc.json").write_text(json.dumps(truthful))
    problem = {"question": "How many legs have two dogs?", "answer": "Two dogs have 2 * 4 = 8 legs.\n#### 8"}
    (tmp_path / "gsm.jsonl").write_text(json.dumps(problem) + "\n")
    tasks = Tasks(tmp_path / "mc.json", tmp_path / "gsm.jsonl", tokenizer=DEMO)
    here = tasks(LocalModel(DEMO, CPU, torch.float32))
    there = tasks(ServedModel(server))
    assert set(here) == {"truthfulqa_mc1", "truthfulqa_mc2", "gsm8k", "gsm8k_flexible"}
    for name, score in here.items():
        assert there[name].value == pytest.approx(score.value, rel=1e-4), name
        assert (score.num_questions, score.num_shots) == (1 if name.startswith("gsm8k") else 2, 0)
    assert 0 < here["truthfulqa_mc2"].value < 1


class _Scripted(BaseHTTPRequestHandler):
    """Answers from `script`, a list of (status, body), the last one again and again."""

    script: list[tuple[int, str]]
    seen: list[str]

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def _answer(self) -> None:
        self.seen.append(self.path)
        status, body = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Not to standard error."""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[_Scripted]]]:
    monkeypatch.setattr(spq.served.time, "sleep", lambda seconds: None)
    handler = type("Handler", (_Scripted,), {"script": [], "seen": []})
    httpd = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


CARD = '{"data": [{"id": "m", "max_model_len": 8}]}'


def test_a_full_queue_is_tried_again_and_a_bad_answer_is_named(scripted: tuple[str, type[_Scripted]]) -> None:
    url, handler = scripted
    busy = (503, '{"error": {"message": "the queue is full"}}')
    handler.script[:] = [busy, busy, (200, CARD)]
    model = ServedModel(url)
    assert (model.context, model.resident_bytes, handler.seen) == (8, None, ["/v1/models"] * 3)
    handler.script[:] = [busy]
    with pytest.raises(RemoteError, match="503: the queue is full"):
        model.tokenize("x")
    assert len(handler.seen) == 3 + spq.served.RETRIES
    for body in ("no json", '{"choices": []}', '{"choices": [{"index": 0, "logprobs": null}]}'):
        handler.script[:] = [(200, body)]
        with pytest.raises(RemoteError, match=r"no JSON|gave no logprobs"):
            model.score(torch.tensor([[1, 2]]))
    handler.script[:] = [(401, "who\nare you")]
    with pytest.raises(RemoteError, match="401: who are you"):
        ServedModel(url)


def test_what_is_no_server_is_refused(scripted: tuple[str, type[_Scripted]]) -> None:
    url, handler = scripted
    handler.script[:] = [(200, '{"data": []}')]
    with pytest.raises(RemoteError, match="names no model"):
        ServedModel(url)
    with pytest.raises(RemoteError, match="not a URL of a server"):
        ServedModel("ftp://x")
    with pytest.raises(RemoteError, match="ConnectionRefusedError"):
        ServedModel("http://127.0.0.1:9")
