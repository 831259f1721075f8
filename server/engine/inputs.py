"""A scheduled batch as tensors: token ids, positions, cache slots, page tables, and which rows give logits.

`HostInputs` collects it in plain arrays; `StepInputs` is the same on the device, sent there in one copy. Recorded
decode steps (`server.engine.graphs`) take the first and have a fixed place for the second.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.ops import AttentionBatch
from server.core import ScheduledBatch, Sequence, Work
from server.engine.transfer import upload

TABLE_STEP = 16  # page tables are as wide as a multiple: Triton compiles a kernel anew for a stride that is none


class PageTables:
    """The page tables of a batch as a matrix on the host. Rows that are as they were in the last step stay.

    A sequence's table only grows at its end, and is another list once its pages went back (`BlockManager.release`): so
    one that is the same list of the same length is the same, and a longer one differs in its new entries alone.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[list[int], int]] = []  # of the last step: table, and how much of it was entered
        self._matrix = torch.zeros(0, 0, dtype=torch.int32)
        self._cells = memoryview(array("i"))  # of the matrix: writing an entry through torch takes 20 us, here 0.1

    def fill(self, tables: list[list[int]]) -> Tensor:
        """int32 [S, longest rounded up to TABLE_STEP], a copy; unused entries are 0."""
        width = -(-max(map(len, tables)) // TABLE_STEP) * TABLE_STEP
        if len(tables) > self._matrix.shape[0] or width > self._matrix.shape[1]:
            rows, columns = max(2 * len(tables), self._matrix.shape[0]), max(2 * width, self._matrix.shape[1])
            memory = array("i", bytes(4 * rows * columns))
            self._cells = memoryview(memory)
            self._matrix = torch.frombuffer(memory, dtype=torch.int32).view(rows, columns)
            self._rows = []
        stride = self._matrix.shape[1]
        kept = self._rows
        del kept[len(tables) :]
        for i, table in enumerate(tables):
            length, known = len(table), 0
            if i < len(kept):
                last, known = kept[i]
                if last is table and known == length:
                    continue
                if last is not table:
                    self._matrix[i].zero_()
                    known = 0
                kept[i] = table, length
            else:
                self._matrix[i].zero_()
                kept.append((table, length))
            begin = i * stride
            self._cells[begin + known : begin + length] = array("i", table[known:])
        return self._matrix[: len(tables), :width].clone(memory_format=torch.contiguous_format)


@dataclass(slots=True)
class HostInputs:
    """One step of T tokens over S sequences, on the host."""

    tables: Tensor  # int32 [S, W], see PageTables.fill
    token_ids: array[int] = field(default_factory=lambda: array("q"))  # [T], as the next two
    positions: array[int] = field(default_factory=lambda: array("q"))
    slots: array[int] = field(default_factory=lambda: array("q"))
    lengths: list[int] = field(default_factory=list)  # [T], see RotaryTable.cos_sin
    context_lens: array[int] = field(default_factory=lambda: array("i"))  # [S]
    query_starts: array[int] = field(default_factory=lambda: array("i", [0]))  # [S + 1]
    sample_rows: array[int] = field(default_factory=lambda: array("q"))  # rows whose logits draw a token
    prompt_rows: dict[int, slice] = field(default_factory=dict)  # work index -> rows that score the next prompt token
    pooled_rows: dict[int, slice] = field(default_factory=dict)  # work index -> rows whose states are summed
    num_decodes: int = 0
    max_query_len: int = 0

    @property
    def awaits_tokens(self) -> bool:
        """Whether a token to run is still being drawn by the step before, see `resolve`."""
        return min(self.token_ids) < 0

    @property
    def is_decode_only(self) -> bool:
        """Whether every row is one token of its own sequence and draws the next one, and nothing else is asked."""
        return len(self.sample_rows) == len(self.token_ids) == self.num_decodes and not (
            self.prompt_rows or self.pooled_rows
        )


@dataclass(slots=True)
class StepInputs:
    """What `Llama.forward` needs for one step, on the device."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: AttentionBatch
    sample_rows: Tensor | None  # int64: rows of `HostInputs.sample_rows`; None where all rows are


def collect(batch: ScheduledBatch, block_size: int, page_tables: PageTables) -> HostInputs:
    """The batch in arrays."""
    host = HostInputs(page_tables.fill([w.sequence.block_table for w in batch.work]))
    if batch.num_decodes:
        _collect_decodes(host, [w.sequence for w in batch.work[: batch.num_decodes]], block_size)
    row = batch.num_decodes
    for index, work in enumerate(batch.work[row:], row):
        sequence, count = work.sequence, work.num_tokens
        table, begin = sequence.block_table, sequence.num_computed_tokens
        end = begin + count
        host.token_ids.extend(work.token_ids)
        host.positions.extend(range(begin, end))
        host.slots.extend([table[p // block_size] * block_size + p % block_size for p in range(begin, end)])
        host.lengths += [max(sequence.num_prompt_tokens, p + 1) for p in range(begin, end)]
        if sequence.params.prompt_logprobs is not None:
            rows = _prompt_rows(work, row)
            if rows.start < rows.stop:
                host.prompt_rows[index] = rows
        if sequence.params.pools:
            new = max(begin, sequence.states.num_tokens)
            if new < end:
                host.pooled_rows[index] = slice(row + new - begin, row + count)
        row += count
        host.query_starts.append(row)
        host.context_lens.append(end)
        if work.samples:
            host.sample_rows.extend(range(row - 1 - len(work.draft_ids), row))
        host.num_decodes += count == 1 and index == host.num_decodes
        host.max_query_len = max(host.max_query_len, count)
    return host


def _collect_decodes(host: HostInputs, sequences: list[Sequence], block_size: int) -> None:
    """The rows of `ScheduledBatch.num_decodes`, column by column: for 256 of them 0.2 ms instead of 0.7 (Zen 3)."""
    positions = [s.num_computed_tokens for s in sequences]
    host.token_ids.extend([s.token_ids[-1] for s in sequences])
    host.positions.extend(positions)
    places = zip(sequences, positions, strict=True)
    host.slots.extend([s.block_table[p // block_size] * block_size + p % block_size for s, p in places])
    host.lengths += [p + 1 for p in positions]
    host.context_lens.extend(host.lengths)
    host.query_starts.extend(range(1, len(sequences) + 1))
    host.sample_rows.extend(range(len(sequences)))
    host.num_decodes, host.max_query_len = len(sequences), 1


def to_device(host: HostInputs, block_size: int, device: torch.device) -> StepInputs:
    """All tensors by one copy."""
    subset = len(host.sample_rows) < len(host.token_ids)
    token_ids, positions, slots, contexts, starts, tables, samples = upload(
        [
            host.token_ids,
            host.positions,
            host.slots,
            host.context_lens,
            host.query_starts,
            host.tables,
            host.sample_rows,
        ],
        device,
    )
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        attention=AttentionBatch(
            slots=slots,
            block_tables=tables.view(host.tables.shape),
            context_lens=contexts,
            query_starts=starts,
            context_lens_host=host.context_lens.tolist(),
            query_starts_host=host.query_starts.tolist(),
            block_size=block_size,
            num_decodes=host.num_decodes,
            max_query_len=host.max_query_len,
            max_context_len=max(host.context_lens),
        ),
        sample_rows=samples if subset else None,
    )


def resolve(token_ids: Tensor, drawn: Tensor | None) -> None:
    """Fill in, on the device, what the host does not know yet: in place of -1 - row stands row of `drawn`.

    token_ids int64 [T], changed in place; drawn int64 [R]: the ids of the step launched before, in order.
    """
    assert drawn is not None, "a token is awaited of a step that draws none"
    rows = (-1 - token_ids).clamp_min_(0)
    token_ids.copy_(torch.where(token_ids < 0, drawn[rows], token_ids))


def _prompt_rows(work: Work, first_row: int) -> slice:
    """Rows that predict a prompt token which has no score yet (a recomputed chunk scores nothing twice)."""
    sequence = work.sequence
    begin = max(sequence.num_computed_tokens, len(sequence.prompt_logprobs))
    end = min(sequence.num_computed_tokens + work.num_tokens, sequence.num_prompt_tokens - 1)
    return slice(first_row + begin - sequence.num_computed_tokens, first_row + end - sequence.num_computed_tokens)
