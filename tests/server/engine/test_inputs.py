"""A batch as tensors: against the plain definition, through packing, and with tables that change between steps."""

from __future__ import annotations

import random
from array import array
from dataclasses import fields

import pytest
import torch

from server.core import SamplingParams, ScheduledBatch, Sequence, Timings, Work
from server.engine import inputs
from server.engine.transfer import ALIGN, Download, as_tensor, pack, upload

SIZE = 4
CPU = torch.device("cpu")


def work(computed: int, count: int, known: int, prompt: int, samples: bool = True, first_page: int = 0) -> Work:
    pages = list(range(first_page, first_page + -(-known // SIZE)))
    params = SamplingParams(max_tokens=9)
    sequence = Sequence("s", [100 + i for i in range(known)], prompt, params, Timings(0.0), None, computed)
    sequence.block_table = pages
    return Work(sequence, count, samples)


def test_a_mixed_batch() -> None:
    batch = ScheduledBatch(
        (work(8, 1, 9, 5, first_page=10), work(4, 1, 5, 5, first_page=3), work(2, 5, 9, 9, False), work(0, 1, 1, 1))
    )
    host = inputs.collect(batch, SIZE, inputs.PageTables())
    step = inputs.to_device(host, SIZE, CPU)
    assert step.token_ids.tolist() == [108, 104, 102, 103, 104, 105, 106, 100]
    assert step.positions.tolist() == [8, 4, 2, 3, 4, 5, 6, 0]
    assert host.lengths == [9, 5, 9, 9, 9, 9, 9, 1]
    attention = step.attention
    assert attention.slots.tolist() == [48, 16, 2, 3, 4, 5, 6, 0]
    assert attention.block_tables[:, :3].tolist() == [[10, 11, 12], [3, 4, 0], [0, 1, 2], [0, 0, 0]]
    assert attention.block_tables.shape == (4, inputs.TABLE_STEP)
    assert not attention.block_tables[:, 3:].any()
    assert attention.context_lens.tolist() == attention.context_lens_host == [9, 5, 7, 1]
    assert attention.query_starts.tolist() == attention.query_starts_host == [0, 1, 2, 7, 8]
    assert (attention.num_decodes, attention.max_query_len, attention.max_context_len) == (2, 5, 9)
    assert step.sample_rows is not None
    assert step.sample_rows.tolist() == [0, 1, 7]
    assert not host.is_decode_only
    types = [t.dtype for t in (step.token_ids, attention.slots, attention.block_tables, attention.query_starts)]
    assert types == [torch.int64, torch.int64, torch.int32, torch.int32]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (work(3, 1, 4, 2), True),
        (work(3, 1, 4, 2, samples=False), False),
        (work(2, 2, 4, 2), False),
    ],
)
def test_what_is_decode_only(last: Work, expected: bool) -> None:
    host = inputs.collect(ScheduledBatch((work(8, 1, 9, 5), last)), SIZE, inputs.PageTables())
    assert host.is_decode_only == expected


def test_a_token_that_scores_its_prompt_is_not_decode_only() -> None:
    piece = work(1, 1, 3, 3, samples=False)
    piece.sequence.params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    piece.sequence.prompt_logprobs = [None]  # type: ignore[list-item]
    host = inputs.collect(ScheduledBatch((work(8, 1, 9, 5), piece)), SIZE, inputs.PageTables())
    assert host.prompt_rows == {1: slice(1, 2)}
    assert not host.is_decode_only


def test_decodes_collected_by_column_are_those_collected_one_by_one() -> None:
    pieces = (work(8, 1, 9, 5, first_page=10), work(4, 1, 5, 3, first_page=3), work(12, 1, 13, 2, first_page=7),
              work(2, 5, 9, 9, False), work(0, 1, 1, 1))  # fmt: skip
    one_by_one = inputs.collect(ScheduledBatch(pieces), SIZE, inputs.PageTables())
    by_column = inputs.collect(ScheduledBatch(pieces, 3), SIZE, inputs.PageTables())
    assert torch.equal(one_by_one.tables, by_column.tables)
    for name in (f.name for f in fields(inputs.HostInputs) if f.name != "tables"):
        assert getattr(by_column, name) == getattr(one_by_one, name), name
    assert by_column.num_decodes == 3


def test_tables_follow_their_sequences_whatever_changes() -> None:
    rng = random.Random(1)
    kept = inputs.PageTables()
    tables = [[1], [2, 3]]
    for _ in range(300):
        change = rng.randrange(6)
        row = rng.randrange(len(tables))
        if change == 0:
            tables.insert(row, [rng.randrange(99) for _ in range(rng.randrange(1, 40))])
        elif change == 1 and len(tables) > 1:
            tables.pop(row)
        elif change == 2:
            tables[row].append(rng.randrange(99))
        elif change == 3:  # its pages went back and it got others, maybe as many: another list
            tables[row] = [rng.randrange(99) for _ in tables[row]]
        elif change == 4:
            tables[row] = tables[row][: max(1, len(tables[row]) - 1)]
        else:
            tables.reverse()
        width = -(-max(map(len, tables)) // inputs.TABLE_STEP) * inputs.TABLE_STEP
        filled = kept.fill(tables)
        assert filled.tolist() == [table + [0] * (width - len(table)) for table in tables]
        filled.fill_(-1)  # a step in progress owns its copy


def test_packed_columns_come_back_from_one_aligned_buffer() -> None:
    matrix = torch.arange(6, dtype=torch.int32).view(2, 3)
    columns = [array("q", [1, -2, 3]), array("i", [7]), array("d"), matrix, array("d", [0.5, 1e300])]
    packed = pack(columns, pinned=False)
    views = packed.views(packed.buffer.clone())
    assert all(begin % ALIGN == 0 for _, begin, _ in packed.spans)
    for column, view in zip(columns, views, strict=True):
        assert torch.equal(view, as_tensor(column))
    for column, view in zip(columns, upload(columns, CPU), strict=True):
        assert torch.equal(view, as_tensor(column))
    assert [t.tolist() for t in Download([matrix, torch.ones(1)]).wait()] == [matrix.tolist(), [1.0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_columns_reach_the_device() -> None:
    device = torch.device("cuda")
    columns = [array("q", range(1000)), array("i", [7]), array("d", [0.5])]
    sent = upload(columns, device)
    assert all(t.is_cuda for t in sent)
    for column, back in zip(columns, Download(sent).wait(), strict=True):
        assert torch.equal(back, as_tensor(column))
