"""A step waits for the device once, where the sampled ids come back: no other operation hands a number to the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Harness
from models import SMALL, random_model
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.ops import BackendName
from server.core import Sequence
from server.engine import sampler, transfer

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
PARAMS: list[dict[str, object]] = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "seed": 2},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1, "logit_bias": ((5, 2.0),)},
    {"temperature": 1.0, "min_p": 0.1, "logprobs": 3, "min_tokens": 2, "stop_token_ids": frozenset({7})},
    {"prompt_logprobs": 2},
]


class Watch(TorchDispatchMode):
    """Collects operations whose result size or value the host has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masks = name.startswith(("aten.index.", "aten.index_put")) and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if any(word in name for word in WAITING) or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def sequences(harness: Harness, count: int = 6) -> list[Sequence]:
    return [
        harness.sequence([3 + i, 9, 4 + 2 * i], str(i), max_tokens=count, **options) for i, options in enumerate(PARAMS)
    ]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_no_operation_of_a_step_waits(backend: BackendName, tmp_path: Path) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    random_model("llama", num_hidden_layers=1, max_position_embeddings=64).save_pretrained(tmp_path)
    harness = Harness(tmp_path, backend=backend)
    count = 6 if backend == "cpu" else 2
    # the interpreter itself reads numbers from tensors, so under it only what follows the model is watched
    watched = harness.runner.run if backend == "cpu" else sampler.Draw
    with Watch() as watch:
        torch.ones(3)[torch.ones(3, dtype=torch.bool)].sum().item()
    assert len(watch.found) >= 2  # it sees what it should
    watch.found.clear()

    def under_watch(*arguments: Any) -> Any:
        with watch:
            return watched(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        if backend == "cpu":
            patch.setattr(harness.runner, "run", under_watch)
        else:
            patch.setattr(sampler, "Draw", under_watch)
        harness.run(sequences(harness, count))
    assert watch.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_waited_for_where_results_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model("llama").save_pretrained(tmp_path)
    harness = Harness(tmp_path, backend="triton", device="cuda", dtype=torch.float16, kv_dtype=torch.int8)
    harness.run(sequences(harness))  # compiles
    waits = 0

    @contextmanager
    def allowed() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("default")
        yield
        torch.cuda.set_sync_debug_mode("error")

    wait = transfer.Download.wait

    def counted(download: transfer.Download) -> list[torch.Tensor]:
        nonlocal waits
        waits += 1
        with allowed():
            return wait(download)

    monkeypatch.setattr(transfer.Download, "wait", counted)
    items = [s for s in sequences(harness) if s.params.prompt_logprobs is None]
    steps: list[int] = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        harness.run(items, steps.append)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == len(steps)
    assert SMALL["vocab_size"] < min(sampler.CUDA_CANDIDATES)  # so no draw needed a second try
