"""Running ahead on the real runner, with the CPU as a device that is done at the launch: the answers of plain order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Harness, drive
from models import SMALL, random_model

from server.core import Sequence
from server.engine import graphs, inputs
from server.scheduler.flight import StepsInFlight

KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "seeded": [{"temperature": t, "seed": 3} for t in (0.3, 1.0, 1.5)],
    "truncated": [{"temperature": 0.9, "top_p": 0.9, "seed": 5}, {"temperature": 1.0, "top_k": 4, "seed": 6}],
    "flat": [{"temperature": 50.0, "top_p": 0.95, "seed": 5}, {}],  # 64 candidates do not suffice
    "logprobs": [{"logprobs": 3}, {"logprobs": 0, "temperature": 1.0, "seed": 2}],
    "prompts": [{"prompt_logprobs": 1}, {}],
    "ends": [{"stop_token_ids": frozenset(range(60)), "min_tokens": 5}, {"max_tokens": 7}, {"max_tokens": 1}],
    "penalties": [{"repetition_penalty": 1.2}, {}],
}


def answers(folder: Path, params: list[dict[str, Any]], ahead: bool, **options: Any) -> tuple[Harness, list[Sequence]]:
    harness = Harness(folder, **options)
    harness.runner.runs_ahead = ahead
    rng = random.Random(9)
    prompts = [[rng.randrange(3, SMALL["vocab_size"]) for _ in range(n)] for n in (4, 30, 1, 62, 17, 100)]
    made = [
        harness.sequence(p, str(i), **{"max_tokens": 24 + i, **params[i % len(params)]}) for i, p in enumerate(prompts)
    ]
    drive(harness.scheduler, harness.runner, made)
    return harness, made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model("llama").save_pretrained(path)
    return path


def count_assumed(monkeypatch: pytest.MonkeyPatch) -> list[StepsInFlight]:
    """One entry for every step that another one is scheduled ahead of, from now on."""
    found: list[StepsInFlight] = []
    assume = StepsInFlight.assume
    monkeypatch.setattr(StepsInFlight, "assume", lambda flight: (found.append(flight), assume(flight)))
    return found


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_runner_says_the_same(
    folder: Path, kind: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `recorded`, decode steps run over the fixed buffers of graphs."""
    monkeypatch.setattr(graphs, "FIRST_CONTEXT", 64)
    assumed = count_assumed(monkeypatch)
    results = []
    for ahead in (False, True):
        replayed = 0

        def recorder(step: graphs.Step) -> graphs.Step:
            step()

            def again() -> None:
                nonlocal replayed
                replayed += 1
                step()

            return again

        _, sequences = answers(folder, KINDS[kind], ahead, recorder=recorder if recorded else None, max_num_seqs=8)
        results.append([(s.token_ids, s.finish_reason, len(s.prompt_logprobs)) for s in sequences])
        assert not recorded or replayed > 1
        assert bool(assumed) == ahead
    assert results[0] == results[1]


def test_the_real_runner_under_preemption(folder: Path) -> None:
    params = [{"max_tokens": 60}, {"max_tokens": 60, "temperature": 1.0, "seed": 4}]
    _, plain = answers(folder, params, False, num_blocks=128, block_size=8)
    harness, ahead = answers(folder, params, True, num_blocks=44, block_size=8, admission_reserve=0.0)
    assert harness.scheduler.num_preemptions > 0, "the test must force a preemption"
    assert [s.token_ids for s in ahead] == [s.token_ids for s in plain]


def test_ids_are_filled_in_where_they_were_drawn() -> None:
    ids = torch.tensor([5, -1, 7, -3, 0])
    inputs.resolve(ids, torch.tensor([40, 41, 42]))
    assert ids.tolist() == [5, 40, 7, 42, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_the_same_with_graphs_and_without_running_ahead(folder: Path, kind: str) -> None:
    """Where the next step really is launched while this one runs."""
    results = []
    for ahead in (False, True):
        _, sequences = answers(
            folder, KINDS[kind], ahead, max_num_seqs=8, recorder=graphs.CudaRecorder(),
            backend="triton", device="cuda", dtype=torch.float16, kv_dtype=torch.float16,
        )  # fmt: skip
        results.append([(s.token_ids, s.finish_reason, len(s.prompt_logprobs)) for s in sequences])
    assert results[0] == results[1]
