"""How fast the kernels are beside what the memory can do: copy bandwidth, products of integers, decode attention.

Timed from CUDA graphs over several copies of the data, more than any L2 cache holds: neither the time Python takes
to launch nor a warm cache is counted. On the CPU (interpreter) the same code runs eagerly; its times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import Maker, num_slots
from kernels.gpu.check_products import product_cases
from kernels.gpu.plan import ModelShape

_COLD_BYTES = 256 << 20  # more than the L2 cache of any GPU named here (72 MB on sm_89, 50 MB on sm_90)
_MAX_COPIES = 32
_REPEATS = 20

Row = dict[str, Any]
T = TypeVar("T")


def seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = _REPEATS) -> float:
    """Median time of one of `calls`, which run one after the other; with no repeats they are only compiled (NaN)."""
    began = time.perf_counter()
    calls[0]()
    if not repeats:
        return float("nan")
    if device.type != "cuda":
        return time.perf_counter() - began
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[repeats // 2]


def copy_bandwidth(device: torch.device, num_bytes: int = 1 << 30) -> Row:
    """TB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.ones(num_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_per_call([lambda: target.copy_(source)], device)
    return {"bytes": 2 * num_bytes, "us": seconds * 1e6, "tb_per_s": 2 * num_bytes / seconds / 1e12}


def int8_products(
    ops: TritonOps, shape: ModelShape, rows: Sequence[int], copy_tb_per_s: float, repeats: int = _REPEATS
) -> Iterator[Row]:
    """Each product of a layer by number of rows: TB/s of weights, share of the copy bandwidth, cuBLAS on floats."""
    make = Maker(ops.device)
    for case in product_cases(ops, shape):
        copies = cold_copies(case.prepare, ops.nbytes)
        dense = make.dense(case.outputs, case.inputs, ops.dtype).weight
        dense_copies = cold_copies(dense.clone, lambda tensor: tensor.nbytes)
        for m in (m for m in rows if case.takes(m)):
            x = make.normal(m, case.inputs, dtype=ops.dtype)
            ours = seconds_per_call([partial(case.run, c, x, None) for c in copies], ops.device, repeats)
            cublas = seconds_per_call([partial(F.linear, x, c) for c in dense_copies], ops.device, repeats)
            rate = case.weight_bytes / ours / 1e12
            yield {
                "model": shape.name, "name": case.name, "rows": m, "us": ours * 1e6, "tb_per_s": rate,
                "of_copy": rate / copy_tb_per_s, "cublas_us": cublas * 1e6, "speedup": cublas / ours,
            }  # fmt: skip


def prefill_products(ops: TritonOps, shape: ModelShape, rows: Sequence[int], repeats: int = _REPEATS) -> Iterator[Row]:
    """Products of long steps with 16-bit and with int8 activations (rounding included): TFLOP/s, beside cuBLAS."""
    make, w8a8 = Maker(ops.device), TritonOps(ops.device, ops.dtype, int8_prefill=True)
    for name, out, inner in (("o", shape.hidden, shape.hidden), ("down", shape.hidden, shape.width)):
        weight, dense = ops.prepare_linear(make.int8(out, inner)), make.dense(out, inner, ops.dtype).weight
        for m in rows:
            x, h = (make.normal(m, n, dtype=ops.dtype) for n in (inner, out))
            calls = {
                "w8a16": partial(ops.add_linear, h, x, weight),
                "w8a8": partial(w8a8.add_linear, h, x, weight),
                "cublas": partial(F.linear, x, dense),
            }
            times = {kind: seconds_per_call([call], ops.device, repeats) for kind, call in calls.items()}
            rates = {f"{kind}_tflops": 2e-12 * m * out * inner / seconds for kind, seconds in times.items()}
            yield {"model": shape.name, "prefill": name, "rows": m, **rates}


def decode_attention(
    ops: TritonOps,
    shape: ModelShape,
    batches: Sequence[int],
    contexts: Sequence[int],
    copy_tb_per_s: float,
    repeats: int = _REPEATS,
) -> Iterator[Row]:
    """One layer's attention of one token per sequence: TB/s of cached keys and values."""
    make = Maker(ops.device)
    for kind, dtype in (("16-bit", ops.dtype), ("int8", torch.int8)):
        for size in batches:
            for context in contexts:
                batch = make.batch([1] * size, [context] * size)
                q = make.normal(size, shape.num_q_heads, shape.head_dim, dtype=ops.dtype)
                slot_bytes = 2 * shape.num_kv_heads * (shape.head_dim * dtype.itemsize + 4 * (dtype == torch.int8))
                num_bytes = size * context * slot_bytes
                slots, heads = num_slots(batch), shape.num_kv_heads
                make_cache = partial(make.cache, slots, heads, shape.head_dim, dtype)
                caches = [make_cache() for _ in range(num_copies(num_bytes))]
                calls = [partial(ops.attention, q, kv, batch, shape.head_dim**-0.5, None) for kv in caches]
                seconds = seconds_per_call(calls, ops.device, repeats)
                rate = num_bytes / seconds / 1e12
                yield {
                    "model": shape.name, "cache": kind, "batch": size, "context": context, "us": seconds * 1e6,
                    "tb_per_s": rate, "of_copy": rate / copy_tb_per_s,
                }  # fmt: skip


def cold_copies(make: Callable[[], T], nbytes: Callable[[T], int]) -> list[T]:
    """As many of them as exceed any L2 cache together, but not too many to make."""
    first = make()
    return [first, *(make() for _ in range(num_copies(nbytes(first)) - 1))]


def num_copies(num_bytes: int) -> int:
    """How many copies of so many bytes `cold_copies` makes."""
    return min(_MAX_COPIES, -(-_COLD_BYTES // max(1, num_bytes)))
