"""NativeOps against the reference in float64: projections of every kind, heads, caches, attention of ragged batches."""

from __future__ import annotations

import copy

import pytest
import torch

from kernels.layers import Layer, run_one_by_one
from kernels.native.backend import NativeOps
from kernels.native.program import fits
from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm
from kernels.reference import ReferenceOps
from kernels.weights import (
    CorrectedWeight,
    DenseWeight,
    Int4Weight,
    Int8Weight,
    LinearWeight,
    LowRankWeight,
    pack_int4,
)

REFERENCE = ReferenceOps(torch.device("cpu"), torch.float64)
BLOCK = 4
# Int8 matrices keep activations to 1 / (2 * 16384) of a row's largest entry, here at most 6 times its rms; pairs twice.
INT8 = 6e-4
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def int8(rows: int, columns: int, bias: bool = False) -> Int8Weight:
    q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return Int8Weight(q, (torch.rand(rows) + 0.5) / 73 / columns**0.5, torch.randn(rows) if bias else None)


def dense(rows: int, columns: int) -> DenseWeight:
    return DenseWeight(torch.randn(rows, columns) / columns**0.5, torch.randn(rows))


def pair(rows: int, columns: int) -> LowRankWeight:
    return LowRankWeight(int8(20, columns), int8(rows, 20, bias=True))


def mixed(rows: int, columns: int) -> LowRankWeight:
    return LowRankWeight(DenseWeight(torch.randn(20, columns) / columns**0.5), int8(rows, 20))


def int4(rows: int, columns: int, bias: bool = False, group: int = 32) -> Int4Weight:
    groups = -(-columns // group)
    q, zero = torch.randint(0, 16, (rows, columns)).byte(), torch.randint(6, 10, (rows, groups)).byte()
    scale = ((torch.rand(rows, groups) + 0.5) / 5 / columns**0.5).half()
    return Int4Weight(pack_int4(q), scale, zero, group, columns, torch.randn(rows) if bias else None)


def pair_int4(rows: int, columns: int) -> LowRankWeight:
    return LowRankWeight(int4(20, columns), int4(rows, 20, bias=True))


def corrected(rows: int, columns: int) -> CorrectedWeight:
    return CorrectedWeight(int4(rows, columns, bias=True), LowRankWeight(int8(6, columns), int8(rows, 6)))


def corrected_int8(rows: int, columns: int) -> CorrectedWeight:
    return CorrectedWeight(int8(rows, columns), LowRankWeight(int4(6, columns), int4(rows, 6)))


def corrected_by_floats(rows: int, columns: int) -> CorrectedWeight:
    pair = LowRankWeight(DenseWeight(torch.randn(3, columns) / columns**0.5), DenseWeight(torch.randn(rows, 3)))
    return CorrectedWeight(int4(rows, columns), pair)


def corrected_floats(rows: int, columns: int) -> CorrectedWeight:
    return CorrectedWeight(dense(rows, columns), LowRankWeight(int8(6, columns), int8(rows, 6)))


CORRECTED = [corrected, corrected_int8, corrected_by_floats, corrected_floats]


def close(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    assert got.shape == want.shape
    assert ((got.double() - want.double()).norm() / want.double().norm()).item() < limit


def ragged(work: list[tuple[int, int]]) -> AttentionBatch:
    """(queries, context) of each sequence, on shuffled pages."""
    blocks = [-(-context // BLOCK) for _, context in work]
    order = torch.randperm(sum(blocks) + 2)
    tables = torch.zeros(len(work), max(blocks) + 1, dtype=torch.int32)
    starts, slots, first = [0], [], 0
    for s, (queries, context) in enumerate(work):
        pages = order[first : first + blocks[s]]
        first += blocks[s]
        tables[s, : blocks[s]] = pages
        starts.append(starts[-1] + queries)
        slots += [int(pages[p // BLOCK]) * BLOCK + p % BLOCK for p in range(context - queries, context)]
    contexts = [context for _, context in work]
    return AttentionBatch(
        torch.tensor(slots), tables, torch.tensor(contexts, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32),
        contexts, starts, BLOCK, 0, max(q for q, _ in work), max(contexts),
    )  # fmt: skip


def full_cache(slots: int, heads: int, width: int, dtype: torch.dtype) -> LayerKv:
    """Every slot holds a random token."""
    scales = [torch.zeros(slots, heads) for _ in range(2)] if dtype == torch.int8 else [None, None]
    kv = LayerKv(*(torch.zeros(slots, heads, width, dtype=dtype) for _ in range(2)), *scales)
    key, value = torch.randn(slots, heads, width), torch.randn(slots, heads, width)
    still = torch.ones(slots, width // 2), torch.zeros(slots, width // 2)
    REFERENCE.rotary_store(key, key, value, *still, kv, torch.arange(slots))
    return kv


def slots_of(batch: AttentionBatch) -> int:
    return (int(batch.block_tables.max()) + 1) * BLOCK


@pytest.mark.parametrize("make", [int8, dense, pair, mixed, int4, pair_int4, *CORRECTED])
@pytest.mark.parametrize("rows", [1, 9])
def test_a_product_is_added_to_the_residual_stream(ops: NativeOps, make: object, rows: int) -> None:
    weight: LinearWeight = make(33, 100)  # type: ignore[operator]
    h, x = torch.randn(rows, 33), torch.randn(rows, 100)
    want = REFERENCE.add_linear(h.double(), x.double(), weight)
    close(ops.add_linear(h, x, ops.prepare_linear(weight)), want, INT8)


@pytest.mark.parametrize(
    "makers",
    [(int8, int8), (pair, int8), (dense, dense), (mixed, pair), (int4, int4), (int4, int8), (corrected, pair_int4),
     (corrected_floats, int4)],
)  # fmt: skip
def test_mlp_input(ops: NativeOps, makers: tuple[object, object]) -> None:
    gate, up = (make(50, 72) for make in makers)  # type: ignore[operator]
    h, norm = torch.randn(7, 72), Norm(torch.rand(72) + 0.5, 1e-5)
    before = h.clone()
    got = ops.mlp_input(h, norm, ops.prepare_gate_up(gate, up))
    close(got, REFERENCE.mlp_input(h.double(), norm, (gate, up)), INT8)
    assert torch.equal(h, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "makers",
    [(int8, int8, int8), (pair, int8, dense), (mixed, pair, pair), (int4, int8, corrected),
     (corrected_int8, corrected, corrected_by_floats), (pair_int4, int4, corrected_floats)],
)  # fmt: skip
@pytest.mark.parametrize("norms", [False, True])
def test_attention_input(ops: NativeOps, dtype: torch.dtype, makers: tuple[object, ...], norms: bool) -> None:
    heads, kv_heads, width, hidden = 4, 2, 16, 64
    q, k, v = (make(n * width, hidden) for make, n in zip(makers, (heads, kv_heads, kv_heads), strict=True))  # type: ignore[operator]
    batch = ragged([(1, 9), (5, 5), (1, 1)])
    mine = full_cache(slots_of(batch), kv_heads, width, dtype)
    theirs, untouched = copy.deepcopy(mine), torch.ones(slots_of(batch), dtype=torch.bool)
    untouched[batch.slots] = False
    angle = torch.rand(7, width // 2) * 6
    head_norms = [Norm(torch.rand(width) + 0.5, 1e-6) for _ in range(2)] if norms else [None, None]
    transform = HeadTransform(angle.cos(), angle.sin(), *head_norms)
    h, norm = torch.randn(7, hidden), Norm(torch.rand(hidden) + 0.5, 1e-5)
    before = copy.deepcopy(mine)
    got = ops.attention_input(h, norm, ops.prepare_qkv(q, k, v), transform, mine, batch.slots)
    want = REFERENCE.attention_input(h.double(), norm, (q, k, v), transform, theirs, batch.slots)
    close(got, want, INT8)
    # a stored value may fall on the other side of a rounding step
    limit = {torch.float32: INT8, torch.bfloat16: 4e-3, torch.float16: INT8 + 1e-3, torch.int8: 8e-3}[dtype]
    for name in ("key", "value"):
        close(getattr(mine, name)[batch.slots], getattr(theirs, name)[batch.slots], limit)
        assert torch.equal(getattr(mine, name)[untouched], getattr(before, name)[untouched])
    if dtype == torch.int8:
        assert mine.key_scale is not None and theirs.key_scale is not None
        close(mine.key_scale[batch.slots], theirs.key_scale[batch.slots], INT8)


SHAPES = [(4, 4, 64, None), (4, 2, 16, None), (3, 1, 24, 5), (8, 1, 128, 33), (20, 1, 8, None), (2, 2, 10, None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "window"), SHAPES)
def test_attention(
    ops: NativeOps, dtype: torch.dtype, heads: int, kv_heads: int, width: int, window: int | None
) -> None:
    batch = ragged([(1, 1), (1, 100), (1, 32), (1, 33), (7, 7), (40, 71), (2, 64)])
    kv = full_cache(slots_of(batch), kv_heads, width, dtype)
    q = torch.randn(batch.query_starts_host[-1], heads, width)
    want = REFERENCE.attention(q.double(), kv, batch, width**-0.5, window)
    close(ops.attention(q, kv, batch, width**-0.5, window), want, 2e-6)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_attention_of_a_token_depends_on_its_sequence_alone(
    ops: NativeOps, dtype: torch.dtype, window: int | None
) -> None:
    """Bit for bit: alone or in company, decoded or as part of a chunk, on one thread or two."""
    batch = ragged([(1, 70), (30, 75), (1, 5)])
    kv = full_cache(slots_of(batch), 2, 32, dtype)
    q = torch.randn(32, 6, 32)
    whole = ops.attention(q, kv, batch, 0.2, window)
    tables = batch.block_tables[1:2].contiguous()
    for row in (1, 13, 30):
        context = 75 - 29 + row - 1
        alone = AttentionBatch(
            batch.slots, tables, torch.tensor([context], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32),
            [context], [0, 1], BLOCK, 1, 1, context,
        )  # fmt: skip
        assert torch.equal(ops.attention(q[row : row + 1], kv, alone, 0.2, window)[0], whole[row])
    ops.use_threads(1)
    assert torch.equal(ops.attention(q, kv, batch, 0.2, window), whole)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "float32", "bfloat16"])
def test_embedding(ops: NativeOps, kind: str, tied: bool) -> None:
    integers = {"int8": int8, "int4": int4}
    table = integers[kind](50, 40) if kind in integers else DenseWeight(torch.randn(50, 40).to(getattr(torch, kind)))
    prepared = ops.prepare_embedding(table, tied_head=tied)
    ids = torch.tensor([3, 49, 0, 3])
    torch.testing.assert_close(ops.embed(ids, prepared), table.dequantize()[ids], rtol=0, atol=0)
    assert ops.nbytes(prepared) <= {"int8": 64 * 44, "int4": 64 * 26}.get(kind, 50 * 40 * 4)
    if tied:
        x = torch.randn(3, 40)
        close(ops.logits(x, prepared), REFERENCE.logits(x.double(), table), INT8)


@pytest.mark.parametrize("make", [int8, int4, corrected])
def test_a_head_of_its_own(ops: NativeOps, make: object) -> None:
    weight, x = make(70, 40), torch.randn(3, 40)  # type: ignore[operator]
    close(ops.logits(x, ops.prepare_linear(weight)), REFERENCE.logits(x.double(), weight), INT8)


def test_projections_that_disagree_are_refused(ops: NativeOps) -> None:
    with pytest.raises(ValueError, match="differ in input width"):
        ops.prepare_qkv(int8(4, 8), int8(4, 8), int8(4, 9))
    with pytest.raises(ValueError, match="must be equal"):
        ops.prepare_gate_up(int8(4, 8), int8(5, 8))


def test_nan_in_a_sequence_stays_there(ops: NativeOps) -> None:
    batch = ragged([(1, 20), (3, 20)])
    kv = full_cache(slots_of(batch), 2, 16, torch.float32)
    q = torch.randn(4, 2, 16)
    clean = ops.attention(q, kv, batch, 0.25, None)
    kv.key[int(batch.block_tables[0, 1]) * BLOCK] = torch.nan
    got = ops.attention(q, kv, batch, 0.25, None)
    assert got[0].isnan().all()
    assert torch.equal(got[1:], clean[1:])


def layer(ops: NativeOps, hidden: int, make: object, *, norms: bool, window: int | None, mlp: object = None) -> Layer:
    """Four query heads and two key heads of 16, an MLP of 50: all matrices made by `make`, gate and up by `mlp`."""

    def norm(n: int) -> Norm:
        return Norm(torch.rand(n) + 0.5, 1e-5)

    def of(rows: int, columns: int, maker: object = make) -> LinearWeight:
        weight: LinearWeight = maker(rows, columns)  # type: ignore[operator]
        return weight

    return Layer(
        norm(hidden), ops.prepare_qkv(int8(64, hidden, bias=True), of(32, hidden), of(32, hidden)),
        norm(16) if norms else None, norm(16) if norms else None, ops.prepare_linear(of(hidden, 64)), norm(hidden),
        ops.prepare_gate_up(of(50, hidden, mlp or int8), int8(50, hidden)) if mlp is not int4
        else ops.prepare_gate_up(int4(50, hidden), int4(50, hidden)),
        ops.prepare_linear(of(hidden, 50)), window,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("hidden", [48, 64])
def test_layers_in_one_call_are_the_operations_one_by_one(ops: NativeOps, dtype: torch.dtype, hidden: int) -> None:
    """Bit for bit: the same code in the same order, whatever shares the work areas."""
    layers = [
        layer(ops, hidden, int8, norms=False, window=None),
        layer(ops, hidden, pair, norms=True, window=9),
        layer(ops, hidden, int4, norms=True, window=None, mlp=int4),
        layer(ops, hidden, corrected, norms=False, window=None, mlp=corrected),
        layer(ops, hidden, corrected_int8, norms=False, window=None, mlp=pair_int4),
        layer(ops, hidden, pair_int4, norms=False, window=None, mlp=corrected_int8),
    ]
    batch = ragged([(1, 30), (7, 20), (1, 1)])
    caches = [full_cache(slots_of(batch), 2, 16, dtype) for _ in layers]
    assert fits(layers, caches)
    others = copy.deepcopy(caches)
    angle = torch.rand(9, 8) * 6
    h = torch.randn(9, hidden)
    want = run_one_by_one(ops, h.clone(), layers, angle.cos(), angle.sin(), others, batch, 0.25)
    got = ops.run_layers(h.clone(), layers, angle.cos(), angle.sin(), caches, batch, 0.25)
    assert torch.equal(got, want)
    for mine, theirs in zip(caches, others, strict=True):
        assert torch.equal(mine.key, theirs.key) and torch.equal(mine.value, theirs.value)


@pytest.mark.parametrize("kinds", [(dense, None), (mixed, None), (corrected_by_floats, None), (int4, corrected_floats)])
def test_what_does_not_fit_one_call_runs_one_by_one(ops: NativeOps, kinds: tuple[object, object]) -> None:
    batch = ragged([(2, 5)])
    layers = [layer(ops, 48, kinds[0], norms=False, window=None, mlp=kinds[1])]
    caches = [full_cache(slots_of(batch), 2, 16, torch.float32)]
    assert not fits(layers, caches)
    angle = torch.rand(2, 8)
    arguments = (layers, angle.cos(), angle.sin(), caches, batch, 0.25)
    h = torch.randn(2, 48)
    assert torch.equal(ops.run_layers(h.clone(), *arguments), run_one_by_one(ops, h, *arguments))
