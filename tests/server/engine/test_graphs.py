"""Recorded decode steps. Without a GPU a step is not recorded but run again over the same buffers: buckets, padding,
places and the scratch page are tested here in full, and the recording itself under the mark gpu.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from harness import Harness
from models import SMALL, random_model

from kernels.ops import AttentionBatch, BackendName
from server.config import ServerConfig
from server.core import SamplingParams
from server.engine import build, graphs, warm_up
from server.engine.build import build_engine
from server.engine.engine import GenerationRequest
from server.engine.graphs import CudaRecorder, Step, context_buckets, row_buckets

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Again:
    """In place of CudaRecorder: replaying runs the step again. Counts what was recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed: Counter[int] = Counter()

    def __call__(self, step: Step) -> Step:
        number = self.recorded
        self.recorded += 1
        step()

        def replay() -> None:
            self.replayed[number] += 1
            step()

        return replay


@pytest.fixture(autouse=True)
def short_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of 16, 64 and 256 tokens for models of 256 positions."""
    monkeypatch.setattr(graphs, "FIRST_CONTEXT", 16)


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, SMALL["vocab_size"]) for _ in range(n)] for n in lengths]


def answers(harness: Harness, lengths: tuple[int, ...], count: int, **params: object) -> list[list[int]]:
    """Each sequence ends at another time, so that the number of rows runs through the buckets."""
    sequences = [
        harness.sequence(p, str(i), max_tokens=count + 2 * i, seed=i, **params) for i, p in enumerate(prompts(lengths))
    ]
    return [s.token_ids for s in harness.run(sequences)]


def test_row_buckets_reach_every_batch_with_little_waste() -> None:
    assert row_buckets(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert row_buckets(1) == [1]
    assert row_buckets(50) == [1, 2, 4, 8, 16, 24, 32, 48, 50]
    assert row_buckets(256)[-6:] == [96, 128, 160, 192, 224, 256]
    for most in range(1, 400):
        buckets = row_buckets(most)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == most


def test_context_buckets_end_at_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert context_buckets(4096) == [1024, 4096]
    assert context_buckets(131072) == [1024, 4096, 16384, 65536, 131072]
    assert context_buckets(5000) == [1024, 4096, 5000]
    assert context_buckets(512) == [512]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "top_p": 0.9}, {"logprobs": 2}])
def test_padded_steps_give_what_unpadded_ones_do(
    backend: BackendName, params: dict[str, object], tmp_path: Path
) -> None:
    random_model("qwen2-window").save_pretrained(tmp_path)
    lengths = (3, 30, 1, 62, 17)
    recorder = Again()
    harness = Harness(tmp_path, backend=backend, recorder=recorder, max_num_seqs=6)
    assert answers(harness, lengths, 12, **params) == answers(Harness(tmp_path, backend=backend), lengths, 12, **params)
    assert recorder.recorded == 4 * 3  # rows 1, 2, 4, 6; contexts 16, 64, 256
    assert len(recorder.replayed) >= 5  # several of each were used
    assert sum(recorder.replayed.values()) >= 18


def test_padded_steps_through_the_triton_kernels(tmp_path: Path) -> None:
    """In the interpreter, where programs past the end of a row and the scratch rows do what they do on a GPU."""
    pytest.importorskip("triton")
    random_model("qwen3", num_hidden_layers=1, max_position_embeddings=64).save_pretrained(tmp_path)
    lengths, options = (3, 20, 9), {"backend": "triton", "kv_dtype": torch.int8, "max_num_seqs": 4}
    recorder = Again()
    padded = answers(Harness(tmp_path, recorder=recorder, **options), lengths, 3)  # type: ignore[arg-type]
    assert padded == answers(Harness(tmp_path, **options), lengths, 3)  # type: ignore[arg-type]
    assert sum(recorder.replayed.values()) >= 6


def test_scratch_rows_touch_no_page_of_a_sequence(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    lengths = (3, 30, 1)
    padded = Harness(tmp_path, backend="reference", recorder=Again(), num_blocks=20, max_num_seqs=8)
    plain = Harness(tmp_path, backend="reference", num_blocks=20, max_num_seqs=8)
    handed_out: set[int] = set()
    for harness in (padded, plain):
        sequences = [harness.sequence(p, max_tokens=60) for p in prompts(lengths)]

        def watch(step: int, sequences: list = sequences) -> None:  # type: ignore[type-arg]
            handed_out.update(page for s in sequences for page in s.block_table)

        harness.run(sequences, watch)
    assert handed_out <= set(range(20))  # the scratch page is number 20
    own = 20 * 16
    for with_scratch, without in zip(padded.cache, plain.cache, strict=True):
        # products of another number of rows differ in their last bits, which grow over 3 layers; entries are about 1
        torch.testing.assert_close(with_scratch.key[:own], without.key, atol=1e-4, rtol=0)
        torch.testing.assert_close(with_scratch.value[:own], without.value, atol=1e-4, rtol=0)
        assert torch.equal(with_scratch.key[:own].any(-1), without.key.any(-1))
        assert with_scratch.key[own].any()  # one place of the page is written, again and again
        assert not with_scratch.key[own + 1 :].any()


def test_a_bucket_always_reads_the_same_places(tmp_path: Path) -> None:
    """What a graph has recorded are addresses: nothing a step reads or writes may move."""
    random_model("llama").save_pretrained(tmp_path)
    harness = Harness(tmp_path, backend="reference")
    made = graphs.DecodeGraphs(
        harness.model,
        harness.cache,
        block_size=16,
        scratch_page=127,
        max_num_seqs=16,
        max_model_len=harness.spec.max_positions,
    )
    seen: dict[tuple[int, int], set[tuple[object, ...]]] = {}
    forward = harness.model.forward

    def watched(ids: torch.Tensor, positions: torch.Tensor, lengths: list[int], batch: AttentionBatch, cache: object):  # type: ignore[no-untyped-def]
        tensors = (ids, positions, batch.slots, batch.block_tables, batch.context_lens, batch.query_starts)
        places = tuple((t.data_ptr(), tuple(t.shape), t.stride()) for t in tensors)
        seen.setdefault((len(ids), batch.max_context_len), set()).add(places)
        assert all(t.data_ptr() % 16 == 0 for t in tensors)
        assert batch.max_context_len >= int(batch.context_lens.max())  # programs enough for the longest row
        return forward(ids, positions, lengths, batch, cache)  # type: ignore[arg-type]

    harness.model.forward = watched  # type: ignore[method-assign]
    made.record(Again(), lambda done: None)
    buckets = set(seen)
    assert len(buckets) == 5 * 3
    harness.runner._graphs = made
    answers(harness, (3, 30, 1, 62, 17), 20)
    assert all(len(places) == 1 for key, places in seen.items() if key in buckets)


def test_steps_with_guesses_are_launched_and_the_others_replayed(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    recorder = Again()
    harness, plain = Harness(tmp_path, recorder=recorder, speculative_ngram=4), Harness(tmp_path)
    prompt = prompts((12,))[0] * 3
    [sequence] = harness.run([harness.sequence(prompt, max_tokens=40)])
    assert sequence.token_ids == plain.run([plain.sequence(prompt, max_tokens=40)])[0].token_ids
    drafter = harness.scheduler.drafter
    assert drafter is not None and drafter.num_drafts > 0
    assert 0 < sum(recorder.replayed.values()) == 39 - drafter.num_accepted_tokens - drafter.num_drafts


def test_steps_with_frequencies_of_their_own_are_launched(tmp_path: Path) -> None:
    random_model("llama-longrope").save_pretrained(tmp_path)  # other frequencies from 65 tokens on
    recorder = Again()
    harness, plain = Harness(tmp_path, recorder=recorder), Harness(tmp_path)
    prompt = prompts((50,))[0]
    [sequence] = harness.run([harness.sequence(prompt, max_tokens=21)])
    assert sequence.token_ids == plain.run([plain.sequence(prompt, max_tokens=21)])[0].token_ids
    assert sum(recorder.replayed.values()) == 14  # lengths 51 to 64 of 51 to 70


def test_progress_is_told_while_recording(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    harness = Harness(tmp_path, backend="reference", recorder=Again(), max_num_seqs=4)
    shares: list[float] = []
    assert harness.graphs is not None
    harness.graphs.record(Again(), shares.append)
    assert shares == [i / 9 for i in range(9)]


def test_the_engine_is_built_with_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU through the start-up, with steps that run again in place of recorded ones."""
    random_model("llama").save_pretrained(tmp_path)
    recorders: list[Again] = []

    def recorder() -> Again:
        recorders.append(Again())
        return recorders[-1]

    monkeypatch.setattr(build, "records_steps", lambda config, ops: True)
    monkeypatch.setattr(warm_up, "CudaRecorder", recorder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    told: list[float] = []
    config = ServerConfig(model=str(tmp_path), device="cpu", max_num_seqs=4, threads=1, kv_memory=2**20)
    engine = build_engine(tmp_path, config, progress=lambda phase, done: told.append(done))
    assert [r.recorded for r in recorders] == [9, 9]  # on one page, then on the real cache; 3 numbers of rows each
    assert sum(engine.info.ledger.values()) > 0
    assert "graphs" in engine.info.ledger
    warming = told[told.index(1.0) + 1 :]
    assert warming == sorted(warming)
    assert len(set(warming)) >= 18

    async def serve() -> list[list[int]]:
        engine.start(asyncio.get_running_loop())
        params = SamplingParams(max_tokens=9, temperature=0.0)
        generations = engine.submit([GenerationRequest(str(i), p, params) for i, p in enumerate(prompts((5, 20, 3)))])
        found = [[o.token_id async for outputs in g for o in outputs] for g in generations]
        await engine.drain(timeout_s=0)
        return found

    served = asyncio.run(serve())
    plain = Harness(tmp_path)
    expected = plain.run([plain.sequence(p, max_tokens=9) for p in prompts((5, 20, 3))])
    assert served == [s.token_ids[s.num_prompt_tokens :] for s in expected]
    assert sum(recorders[1].replayed.values()) >= 8
    assert not recorders[0].replayed


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.int8])
def test_recorded_steps_give_what_launched_ones_do(kv_dtype: torch.dtype, tmp_path: Path) -> None:
    random_model("qwen3").save_pretrained(tmp_path)
    options = {"backend": "triton", "kv_dtype": kv_dtype, "dtype": torch.float16, "device": "cuda", "max_num_seqs": 6}
    lengths = (3, 30, 1, 62, 17)
    recorded = Harness(tmp_path, recorder=CudaRecorder(), **options)  # type: ignore[arg-type]
    launched = Harness(tmp_path, recorder=Again(), **options)  # type: ignore[arg-type]
    assert answers(recorded, lengths, 40) == answers(launched, lengths, 40)


@pytest.mark.gpu
@needs_gpu
def test_memory_of_graphs_is_given_back(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    free = []
    for _ in range(3):
        harness = Harness(
            tmp_path, backend="triton", device="cuda", dtype=torch.float16, kv_dtype=torch.float16,
            recorder=CudaRecorder(),
        )  # fmt: skip
        del harness
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[2] >= free[1]
