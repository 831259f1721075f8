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
from server.core import ScheduledBatch, Work
from server.engine.transfer import upload

TABLE_STEP = 16  # page tables are as wide as a multiple: Triton compiles a kernel anew for a stride that is none


class PageTables:
    """The page tables of a batch as a matrix on the host. Rows that are as they were in the last step stay."""

    def __init__(self) -> None:
        self._rows: list[list[int]] = []
        self._matrix = torch.zeros(0, 0, dtype=torch.int32)

    def fill(self, tables: list[list[int]]) -> Tensor:
        """int32 [S, longest rounded up to TABLE_STEP], a copy; unused entries are 0."""
        width = -(-max(map(len, tables)) // TABLE_STEP) * TABLE_STEP
        if len(tables) > self._matrix.shape[0] or width > self._matrix.shape[1]:
            rows, columns = max(2 * len(tables), self._matrix.shape[0]), max(2 * width, self._matrix.shape[1])
            self._matrix = torch.zeros(rows, columns, dtype=torch.int32)
            self._rows = [[] for _ in range(rows)]
        for i, table in enumerate(tables):
            if self._rows[i] != table:
                row = self._matrix[i]
                row[: len(table)] = torch.frombuffer(array("i", table), dtype=torch.int32)
                row[len(table) :] = 0
                self._rows[i] = table.copy()
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
    num_decodes: int = 0
    max_query_len: int = 0

    @property
    def is_decode_only(self) -> bool:
        """Whether every row is one token of its own sequence and draws the next one, and nothing else is asked."""
        return len(self.sample_rows) == len(self.token_ids) == self.num_decodes and not self.prompt_rows


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
    row = 0
    for index, work in enumerate(batch.work):
        sequence, count = work.sequence, work.num_tokens
        table, begin = sequence.block_table, sequence.num_computed_tokens
        end = begin + count
        if count == 1:  # the usual case: without the ranges and lists of the general one
            host.token_ids.append(sequence.token_ids[begin])
            host.positions.append(begin)
            host.slots.append(table[begin // block_size] * block_size + begin % block_size)
            host.lengths.append(max(sequence.num_prompt_tokens, end))
            host.num_decodes += index == host.num_decodes
        else:
            host.token_ids.extend(work.token_ids)
            host.positions.extend(range(begin, end))
            host.slots.extend([table[p // block_size] * block_size + p % block_size for p in range(begin, end)])
            host.lengths += [max(sequence.num_prompt_tokens, p + 1) for p in range(begin, end)]
        if sequence.params.prompt_logprobs is not None:
            rows = _prompt_rows(work, row)
            if rows.start < rows.stop:
                host.prompt_rows[index] = rows
        row += count
        host.query_starts.append(row)
        host.context_lens.append(end)
        if work.samples:
            host.sample_rows.extend(range(row - 1 - len(work.draft_ids), row))
        host.max_query_len = max(host.max_query_len, count)
    return host


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


def _prompt_rows(work: Work, first_row: int) -> slice:
    """Rows that predict a prompt token which has no score yet (a recomputed chunk scores nothing twice)."""
    sequence = work.sequence
    begin = max(sequence.num_computed_tokens, len(sequence.prompt_logprobs))
    end = min(sequence.num_computed_tokens + work.num_tokens, sequence.num_prompt_tokens - 1)
    return slice(first_row + begin - sequence.num_computed_tokens, first_row + end - sequence.num_computed_tokens)
