"""Driving scheduler and runner: by hand, without a thread, on a real model folder; or by the real loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from kernels.ops import BackendName, Ops, make_ops
from server.core import FinishReason, SamplingParams, Sequence, StepOutput, Timings
from server.engine.graphs import DecodeGraphs, Recorder
from server.engine.kv_cache import allocate
from server.engine.loop import EngineLoop, Runner
from server.engine.runner import ModelRunner
from server.model.coded import CodedLayers
from server.model.load import load_model
from server.scheduler.blocks import BlockManager
from server.scheduler.ngram import NgramDrafter
from server.scheduler.scheduler import Scheduler
from spq.checkpoint import open_model


class Harness:
    """A model folder with a scheduler and a cache, stepped by hand; integrity is checked after every step."""

    def __init__(
        self,
        folder: Path,
        *,
        backend: BackendName = "cpu",
        num_blocks: int = 128,
        block_size: int = 16,
        max_batch_tokens: int = 48,
        max_num_seqs: int = 16,
        admission_reserve: float = 1.0,
        kv_dtype: torch.dtype = torch.float32,
        prefix_caching: bool = True,
        dtype: torch.dtype = torch.float32,
        speculative_ngram: int = 0,
        device: str = "cpu",
        recorder: Recorder | None = None,
        make_coded: Callable[[Ops], CodedLayers] | None = None,
    ) -> None:
        """With a recorder, steps that only decode go through graphs made by it; with `make_coded` layers stay coded."""
        source = open_model(folder)
        self.spec = source.spec
        ops = make_ops(torch.device(device), dtype, backend)
        self.coded = None if make_coded is None else make_coded(ops)
        self.model, self.bytes = load_model(source, ops, source.spec.max_positions, coded=self.coded)
        self.outputs: list[StepOutput] = []
        num_pages = num_blocks + (recorder is not None)
        self.cache = allocate(self.spec, num_pages * block_size, kv_dtype, torch.device(device))
        self.graphs = None
        if recorder is not None:
            self.graphs = DecodeGraphs(
                self.model,
                self.cache,
                block_size=block_size,
                scratch_page=num_blocks,
                max_num_seqs=max_num_seqs,
                max_model_len=self.spec.max_positions,
            )
            self.graphs.record(recorder, lambda done: None)
        self.runner = ModelRunner(self.model, self.cache, block_size, self.graphs)
        self.scheduler = Scheduler(
            BlockManager(num_blocks, block_size, prefix_caching and not self.model.rope.length_dependent),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            max_model_len=self.spec.max_positions,
            admission_reserve=admission_reserve,
            drafter=NgramDrafter(speculative_ngram) if speculative_ngram else None,
        )

    def sequence(self, prompt: list[int], name: str = "s", **params: object) -> Sequence:
        """A sequence with greedy defaults."""
        options: dict[str, object] = {"max_tokens": 64, "temperature": 0.0, **params}
        return Sequence(name, list(prompt), len(prompt), SamplingParams(**options), Timings(0.0))  # type: ignore[arg-type]

    def run(self, sequences: list[Sequence], on_step: Callable[[int], None] | None = None) -> list[Sequence]:
        """Run until nothing is left."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        step = 0
        while (batch := self.scheduler.schedule(float(step))) is not None:
            self.outputs += self.scheduler.commit(batch, self.runner.run(batch), float(step))
            self.scheduler.check()
            step += 1
            if on_step is not None:
                on_step(step)
        return sequences


Act = Callable[[EngineLoop, StepOutput], None]


def drive(scheduler: Scheduler, runner: Runner, sequences: list[Sequence], act: Act | None = None) -> list[StepOutput]:
    """The real loop until all sequences have ended; `act` is called with every output on the loop's thread."""
    loop = EngineLoop(scheduler, runner, check_every_step=True)
    outputs: list[StepOutput] = []

    def publish(batch: list[StepOutput]) -> None:
        outputs.extend(batch)
        for output in batch if act is not None else ():
            act(loop, output)

    for sequence in sequences:
        loop.add(sequence)
    loop.start(publish)
    end = time.monotonic() + 60
    while loop.alive and (scheduler.flight or any(s.finish_reason is None for s in sequences)):
        assert time.monotonic() < end, "the loop stands still"
        time.sleep(0.002)
    loop.stop()
    assert all(s.finish_reason is not FinishReason.ERROR for s in sequences), "the loop failed"
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
    assert not scheduler.flight.bound
    return outputs
