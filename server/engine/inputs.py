"""A scheduled batch as tensors: token ids, positions, cache slots, page tables, and which rows give logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import AttentionBatch
from server.core import ScheduledBatch, Work


@dataclass(slots=True)
class StepInputs:
    """Everything `Llama.forward` and the sampler need for one step of T tokens."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    lengths: list[int]  # [T], see RotaryTable.cos_sin
    attention: AttentionBatch
    sample_rows: list[int]  # rows whose logits draw the next token, one per sampling work and guess
    prompt_rows: dict[int, list[int]]  # work index -> rows whose logits score the following prompt token


def build(batch: ScheduledBatch, block_size: int, device: torch.device) -> StepInputs:
    """Tensors of one step on `device`. Host lists first: one copy per tensor, none per sequence."""
    token_ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    slots: list[int] = []
    starts = [0]
    contexts: list[int] = []
    sample_rows: list[int] = []
    prompt_rows: dict[int, list[int]] = {}
    width = max(len(w.sequence.block_table) for w in batch.work)
    tables: list[list[int]] = []
    num_decodes = 0
    for index, work in enumerate(batch.work):
        sequence = work.sequence
        begin, end = sequence.num_computed_tokens, sequence.num_computed_tokens + work.num_tokens
        token_ids += work.token_ids
        positions += range(begin, end)
        lengths += [max(sequence.num_prompt_tokens, p + 1) for p in range(begin, end)]
        table = sequence.block_table
        slots += [table[p // block_size] * block_size + p % block_size for p in range(begin, end)]
        rows = _prompt_rows(work, starts[-1])
        if rows:
            prompt_rows[index] = rows
        starts.append(starts[-1] + work.num_tokens)
        contexts.append(end)
        tables.append(table + [0] * (width - len(table)))
        if work.samples:
            sample_rows += range(starts[-1] - 1 - len(work.draft_ids), starts[-1])
        num_decodes += index == num_decodes and work.num_tokens == 1
    return StepInputs(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        lengths=lengths,
        attention=AttentionBatch(
            slots=torch.tensor(slots, dtype=torch.int64, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens_host=contexts,
            query_starts_host=starts,
            block_size=block_size,
            num_decodes=num_decodes,
            max_query_len=max(w.num_tokens for w in batch.work),
            max_context_len=max(contexts),
        ),
        sample_rows=sample_rows,
        prompt_rows=prompt_rows,
    )


def _prompt_rows(work: Work, first_row: int) -> list[int]:
    """Rows that predict a prompt token which has no score yet (a recomputed chunk scores nothing twice)."""
    sequence = work.sequence
    if sequence.params.prompt_logprobs is None:
        return []
    begin = max(sequence.num_computed_tokens, len(sequence.prompt_logprobs))
    end = min(sequence.num_computed_tokens + work.num_tokens, sequence.num_prompt_tokens - 1)
    return [first_row + p - sequence.num_computed_tokens for p in range(begin, end)]
