"""What the benchmark measures: operations, shapes, rotating inputs, and the bytes each must move.

Not how it is timed (`bench`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm, Ops
from kernels.weights import Int4Weight, Int8Weight, LinearWeight, LowRankWeight

BLOCK = 16  # tokens per page
GROUP = 128  # inputs per scale of int4


@dataclass(frozen=True, slots=True)
class Size:
    """What to measure: model shapes and step sizes."""

    matrices: tuple[tuple[int, int], ...]  # (out, in)
    pairs: tuple[tuple[int, int, int], ...]  # (out, in, rank)
    gate_ups: tuple[tuple[int, int], ...]  # (width, in)
    rows: tuple[int, ...]
    heads: tuple[int, int, int]  # query heads, key/value heads, head size
    contexts: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]  # (queries, context)
    rotate_bytes: int  # weights rotate over at least this much
    budget_s: float  # per measurement


CPU = Size(
    matrices=((768, 768), (2048, 768), (4096, 4096)),
    pairs=((768, 768, 192), (4096, 4096, 1024)),
    gate_ups=((2048, 768),),
    rows=(1, 4, 16, 64),
    heads=(32, 8, 128),
    contexts=(128, 512, 2048),
    prompts=((128, 128), (128, 1024)),
    rotate_bytes=80 << 20,
    budget_s=0.12,
)
CUDA = Size(
    matrices=((4096, 4096), (11008, 4096), (4096, 11008)),
    pairs=((4096, 4096, 1024), (4096, 4096, 1664)),
    gate_ups=((11008, 4096),),
    rows=(1, 4, 16, 64),
    heads=(32, 32, 128),
    contexts=(512, 4096, 16384),
    prompts=((512, 512), (512, 4096)),
    rotate_bytes=256 << 20,
    budget_s=0.3,
)
QUICK = Size(((48, 64),), ((48, 64, 8),), ((40, 64),), (1, 3), (4, 2, 16), (20,), ((8, 24),), 1 << 14, 0.005)


@dataclass(slots=True)
class Case:
    """One measurement: `call` runs the operation on one of the rotating items."""

    op: str
    shape: dict[str, int | str]
    nbytes: int
    call: Callable[[Any], object]
    items: list[Any]


def int8_weight(rows: int, columns: int) -> Int8Weight:
    """Random weights whose product keeps the size of its input."""
    scale = torch.full((rows,), 1 / (73 * columns**0.5))  # 73: standard deviation of -127..127
    return Int8Weight(torch.randint(-127, 128, (rows, columns), dtype=torch.int8), scale)


def int4_weight(rows: int, columns: int) -> Int4Weight:
    """The same in 4 bits, symmetric."""
    q = torch.randint(0, 256, (rows, -(-columns // 2)), dtype=torch.uint8)
    scale = torch.full((rows, -(-columns // GROUP)), 1 / (4.6 * columns**0.5), dtype=torch.float16)  # 4.6: of -8..7
    return Int4Weight(q, scale, None, GROUP, columns)


def weight_cases(ops: Ops, size: Size) -> Iterator[Case]:
    """Int8 and int4 matrices, low-rank pairs, gate and up."""
    makers: list[tuple[str, dict[str, int | str], Callable[[], Any], Callable[[Tensor, Any], object], int, int]] = []
    for out, columns in size.matrices:
        shape: dict[str, int | str] = {"out": out, "in": columns}
        for name, weight in (("int8_linear", int8_weight(out, columns)), ("int4_linear", int4_weight(out, columns))):
            makers.append((name, shape, _prepare(ops, weight), ops.logits, weight.nbytes, out))
    for out, columns, rank in size.pairs:
        pair = LowRankWeight(int8_weight(rank, columns), int8_weight(out, rank))
        shape = {"out": out, "in": columns, "rank": rank}
        makers.append(("low_rank", shape, _prepare(ops, pair), ops.logits, pair.nbytes, out))
    for width, columns in size.gate_ups:
        gate, up = int8_weight(width, columns), int8_weight(width, columns)
        shape = {"out": width, "in": columns}
        prepare = _prepare(ops, gate, up)
        norm = Norm(torch.ones(columns, dtype=ops.dtype, device=ops.device), 1e-5)

        def mlp_input(x: Tensor, item: Any, norm: Norm = norm) -> object:
            return ops.mlp_input(x, norm, item)

        makers.append(("mlp_input", shape, prepare, mlp_input, gate.nbytes + up.nbytes, width))
    for op, shape, prepare, call, nbytes, out in makers:
        items = [prepare() for _ in range(max(1, -(-size.rotate_bytes // nbytes)))]
        for rows in size.rows:
            x = _random(ops, rows, int(shape["in"]))
            moved = nbytes + x.nbytes + rows * out * x.element_size()
            yield Case(op, {"rows": rows, **shape}, moved, lambda item, x=x, call=call: call(x, item), items)  # type: ignore[misc]


def _prepare(ops: Ops, *weights: LinearWeight) -> Callable[[], Any]:
    """A function that lays out a fresh copy each time."""
    if len(weights) == 1:
        return lambda: ops.prepare_linear(copy.deepcopy(weights[0]))
    return lambda: ops.prepare_gate_up(copy.deepcopy(weights[0]), copy.deepcopy(weights[1]))


def input_cases(ops: Ops, size: Size) -> Iterator[Case]:
    """Everything before attention: norm, q, k and v, rotation, the write to the cache."""
    heads, kv_heads, width = size.heads
    hidden = heads * width
    outputs = (heads * width, kv_heads * width, kv_heads * width)
    norm = Norm(torch.ones(hidden, dtype=ops.dtype, device=ops.device), 1e-5)
    nbytes = sum(outputs) * (hidden + 4)
    items = []
    for _ in range(max(1, -(-size.rotate_bytes // nbytes))):
        q, k, v = (int8_weight(out, hidden) for out in outputs)
        items.append(ops.prepare_qkv(q, k, v))
    for rows in size.rows:
        h = _random(ops, rows, hidden)
        angles = torch.rand(rows, width // 2, device=ops.device)
        transform = HeadTransform(angles, angles)
        kv = _cache(1024, kv_heads, width, ops.dtype, ops.device)
        slots = torch.randperm(1024)[:rows].to(ops.device)
        shape: dict[str, int | str] = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "head_dim": width}

        def project(
            item: Any,
            h: Tensor = h,
            transform: HeadTransform = transform,
            kv: LayerKv = kv,
            slots: Tensor = slots,
        ) -> object:
            return ops.attention_input(h, norm, item, transform, kv, slots)

        moved = nbytes + h.nbytes + rows * sum(outputs) * h.element_size()
        yield Case("attention_input", shape, moved, project, items)


def attention_cases(ops: Ops, size: Size) -> Iterator[Case]:
    """Decoding by context and kind of cache, pages scattered or in a row; then a chunk of a prompt."""
    heads, kv_heads, width = size.heads
    for kind, queries, context in [("decode_attention", 1, c) for c in size.contexts] + [
        ("prefill_attention", q, c) for q, c in size.prompts
    ]:
        sequences = 4 if queries == 1 else 1
        pages = sequences * -(-context // BLOCK)
        q = _random(ops, sequences * queries, heads, width)
        for dtype, scattered in ((ops.dtype, True), (ops.dtype, False), (torch.int8, True)):
            slots = pages * BLOCK
            token_bytes = kv_heads * (width * dtype.itemsize + (4 if dtype == torch.int8 else 0))
            moved = 2 * sequences * context * token_bytes + 2 * q.nbytes
            copies = min(64, -(-size.rotate_bytes // moved))
            caches = [_cache(slots, kv_heads, width, dtype, ops.device) for _ in range(copies)]
            batch = _batch(sequences, queries, context, scattered, ops.device)
            shape: dict[str, int | str] = {"sequences": sequences, "queries": queries, "context": context}
            shape |= {"heads": heads, "kv_heads": kv_heads, "head_dim": width}
            shape |= {"kv_dtype": str(dtype).removeprefix("torch."), "pages": "scattered" if scattered else "in a row"}

            def attend(kv: LayerKv, q: Tensor = q, batch: AttentionBatch = batch) -> object:
                return ops.attention(q, kv, batch, width**-0.5, None)

            yield Case(kind, shape, moved, attend, caches)


def _random(ops: Ops, *shape: int) -> Tensor:
    return torch.randn(*shape, device=ops.device).to(ops.dtype)


def _cache(slots: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> LayerKv:
    shape = (slots, kv_heads, width)
    if dtype != torch.int8:
        return LayerKv(*(torch.ones(shape, dtype=dtype, device=device) for _ in range(2)))
    tensors = [torch.ones(shape, dtype=dtype, device=device) for _ in range(2)]
    return LayerKv(*tensors, *(torch.ones(shape[:2], device=device) for _ in range(2)))


def _batch(sequences: int, queries: int, context: int, scattered: bool, device: torch.device) -> AttentionBatch:
    pages = sequences * -(-context // BLOCK)
    order = torch.randperm(pages) if scattered else torch.arange(pages)
    starts = list(range(0, sequences * queries + 1, queries))
    return AttentionBatch(
        slots=torch.zeros(sequences * queries, dtype=torch.long, device=device),
        block_tables=order.view(sequences, -1).int().to(device),
        context_lens=torch.full((sequences,), context, dtype=torch.int32, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens_host=[context] * sequences,
        query_starts_host=starts,
        block_size=BLOCK,
        num_decodes=sequences if queries == 1 else 0,
        max_query_len=queries,
        max_context_len=context,
    )
