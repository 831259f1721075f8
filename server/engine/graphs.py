"""Decode steps recorded once as CUDA graphs, one per bucket of (rows, context), and replayed over fixed buffers.

Launching the kernels of a layer from Python takes longer than running them, so a step that only decodes is replayed
as a whole. Recorded is the way from token ids to logits. Sampling follows on the same stream without a wait: what it
does depends on what the rows ask for, so recording it too would multiply the graphs, and greedy is a single kernel.

Rows that fill a bucket have the scratch page: one page behind those of the block manager, which never hands it out.
They store their key there and see one token. Kernels take lengths from device tensors, but the number of programs of
decode attention is fixed by the longest context of a graph, and those past a sequence's end still cost their launch: at
64 rows of 32 heads a graph for 131,072 tokens has a million of them in each layer. Contexts therefore have buckets too,
a factor of 4 apart.

Addresses of the KV cache are part of a graph, while the size of the cache depends on what the graphs take. So all are
recorded twice: on a cache of one page to measure them (`server.engine.warm_up`), and on the real one. An estimate in
place of the first pass would save a few seconds of start-up, and either waste memory or run out of it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.ops import AttentionBatch, LayerKv
from server.engine.inputs import TABLE_STEP, HostInputs, resolve
from server.engine.transfer import ALIGN, Packed, pack
from server.model.llama import Llama

FIRST_CONTEXT = 1024  # tokens; below, even 3 of 4 programs that leave at once cost less than a bucket more
CONTEXT_STEP = 4

Step = Callable[[], None]
Recorder = Callable[[Step], Step]  # from a step to what replays it


def row_buckets(max_num_seqs: int) -> list[int]:
    """Numbers of rows that are recorded: 1, 2, 4, then steps of 8 to 32, 16 to 64, 32 to 256 and 64 beyond."""
    buckets, rows = [1, 2, 4], 8
    while rows < max_num_seqs:
        buckets.append(rows)
        rows += 8 if rows < 32 else 16 if rows < 64 else 32 if rows < 256 else 64
    return [*(b for b in buckets if b < max_num_seqs), max_num_seqs]


def context_buckets(max_model_len: int) -> list[int]:
    """Longest contexts that are recorded, in tokens."""
    buckets = [FIRST_CONTEXT]
    while buckets[-1] < max_model_len:
        buckets.append(CONTEXT_STEP * buckets[-1])
    return [*buckets[:-1], max_model_len]


class CudaRecorder:
    """Records on the current device. All graphs share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run the step once, which compiles its kernels, then record it. Both write to the scratch page only."""
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


class DecodeGraphs:
    """The recorded steps of a model over one cache."""

    def __init__(
        self,
        model: Llama,
        cache: list[LayerKv],
        *,
        block_size: int,
        scratch_page: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """`cache` holds the scratch page beside those of the block manager."""
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._scratch_page = scratch_page
        self._row_buckets = row_buckets(max_num_seqs)
        self._context_buckets = context_buckets(max_model_len)
        self._steps: dict[tuple[int, int], Step] = {}
        device = model.ops.device
        pages = -(-max_model_len // block_size)
        width = -(-pages // TABLE_STEP) * TABLE_STEP
        self._inputs = torch.zeros(max_num_seqs * (28 + 4 * width) + 5 * ALIGN, dtype=torch.uint8, device=device)
        self._tables = torch.full((max_num_seqs, width), scratch_page, dtype=torch.int32, device=device)
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._logits = torch.zeros(max_num_seqs, model.spec.vocab_size, device=device)
        self._contexts: list[int] = []  # of the rows in the buffers, for back ends that read the host's copy

    @torch.inference_mode()
    def record(self, recorder: Recorder, progress: Callable[[float], None]) -> None:
        """Record every bucket; the largest first, so that the others find their memory in its pool."""
        keys = [(rows, context) for context in self._context_buckets for rows in self._row_buckets]
        for done, (rows, context) in enumerate(reversed(keys)):
            progress(done / len(keys))
            self._load(None, rows)
            self._steps[rows, context] = recorder(self._step(rows, context))

    def run(self, host: HostInputs, drawn: Tensor | None) -> Tensor | None:
        """Logits float32 [S, vocab] of a step, valid until the next; None where it has to run the other way.

        drawn: see `inputs.resolve`.
        """
        if not host.is_decode_only or self._model.rope.varies(host.lengths):
            return None
        num_rows, longest = len(host.token_ids), max(host.context_lens)
        if num_rows > self._row_buckets[-1] or longest > self._context_buckets[-1]:
            return None
        rows = self._row_buckets[bisect_left(self._row_buckets, num_rows)]
        context = self._context_buckets[bisect_left(self._context_buckets, longest)]
        token_ids = self._load(host, rows)
        if host.awaits_tokens:
            resolve(token_ids, drawn)
        self._steps[rows, context]()
        return self._logits[:num_rows]

    def _step(self, rows: int, max_context: int) -> Step:
        """The work of one bucket over the fixed buffers."""
        token_ids, positions, slots, context_lens, _tables = self._pack(None, rows).views(self._inputs)

        def step() -> None:
            batch = AttentionBatch(
                slots=slots,
                block_tables=self._tables[:rows],
                context_lens=context_lens,
                query_starts=self._starts[: rows + 1],
                context_lens_host=self._contexts,
                query_starts_host=list(range(rows + 1)),
                block_size=self._block_size,
                num_decodes=rows,
                max_query_len=1,
                max_context_len=max_context,
            )
            hidden = self._model.forward(token_ids, positions, [], batch, self._cache)
            self._logits[:rows].copy_(self._model.logits(hidden))

        return step

    def _load(self, host: HostInputs | None, rows: int) -> Tensor:
        """Fill the buffers of a bucket: one copy from the host, one on the device that spreads the page tables.

        Returns the place of the token ids, int64 [rows].
        """
        packed = self._pack(host, rows)
        self._inputs[: len(packed.buffer)].copy_(packed.buffer, non_blocking=True)
        views = packed.views(self._inputs)
        tables = views[-1].view(rows, -1)
        self._tables[:rows, : tables.shape[1]].copy_(tables)
        self._contexts = [*(() if host is None else host.context_lens), *[1] * (rows - _num_rows(host))]
        return views[0]

    def _pack(self, host: HostInputs | None, rows: int) -> Packed:
        """The inputs with scratch rows behind them. Places depend on the number of rows alone; tables come last."""
        missing = rows - _num_rows(host)
        filler = HostInputs(torch.zeros(0, TABLE_STEP, dtype=torch.int32)) if host is None else host
        width = filler.tables.shape[1]
        return pack(
            [
                filler.token_ids + array("q", [0]) * missing,
                filler.positions + array("q", [0]) * missing,
                filler.slots + array("q", [self._scratch_page * self._block_size]) * missing,
                filler.context_lens + array("i", [1]) * missing,
                torch.cat((filler.tables, torch.full((missing, width), self._scratch_page, dtype=torch.int32))),
            ],
            pinned=self._inputs.is_cuda,
        )


def _num_rows(host: HostInputs | None) -> int:
    return 0 if host is None else len(host.token_ids)
