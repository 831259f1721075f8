"""How fast the kernels are beside what the memory can do: copy bandwidth, int8 products, decode attention.

Timed from CUDA graphs over several copies of the data, more than any L2 cache holds: neither the time Python takes
to launch nor a warm cache is counted. On the CPU (interpreter) the same code runs eagerly; its times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import Maker, num_slots
from kernels.gpu.check_decode import ModelShape

_COLD_BYTES = 256 << 20  # more than the L2 cache of any GPU named here (72 MB on sm_89, 50 MB on sm_90)
_MAX_COPIES = 32
_REPEATS = 20

Row = dict[str, Any]


def seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = _REPEATS) -> float:
    """Median time of one of `calls`, which run one after the other."""
    for call in calls:
        call()  # compiles
    if device.type != "cuda":
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls)
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


def int8_products(ops: TritonOps, shape: ModelShape, rows: Sequence[int], copy_tb_per_s: float) -> Iterator[Row]:
    """Each projection by number of rows: TB/s of weights, share of the copy bandwidth, cuBLAS on float weights."""
    make = Maker(ops.device)
    h, w, r = shape.hidden, shape.width, shape.rank
    q = make.low_rank(h, h, r)
    dense_qkv, dense_mlp = (make.dense(n, k, ops.dtype).weight for n, k in ((3 * h, h), (2 * w, h)))
    dense_o, dense_down = (make.dense(h, k, ops.dtype).weight for k in (h, w))
    cases: dict[str, tuple[Callable[[], Any], Callable[..., Any], torch.Tensor]] = {
        "o": (lambda: ops.prepare_linear(make.int8(h, h)), ops.linear, dense_o),
        "down": (lambda: ops.prepare_linear(make.int8(h, w)), ops.linear, dense_down),
        "gate_up": (lambda: ops.prepare_gate_up(make.int8(w, h), make.int8(w, h)), ops.gate_up_silu, dense_mlp),
        "qkv": (lambda: ops.prepare_qkv(*(make.int8(h, h) for _ in range(3))), ops.qkv, dense_qkv),
        f"qkv rank {r}": (lambda: ops.prepare_qkv(q, q, q), ops.qkv, dense_qkv),
    }
    for name, (prepare, run, dense) in cases.items():
        first = prepare()
        num_bytes = ops.nbytes(first)
        copies = [first] + [prepare() for _ in range(_num_copies(num_bytes) - 1)]
        dense_copies = [dense] + [dense.clone() for _ in range(_num_copies(dense.nbytes) - 1)]
        for m in rows:
            x = make.normal(m, dense.shape[1], dtype=ops.dtype)
            ours = seconds_per_call([lambda c=c, x=x, run=run: run(x, c) for c in copies], ops.device)  # type: ignore[misc]
            cublas = seconds_per_call([lambda c=c, x=x: F.linear(x, c) for c in dense_copies], ops.device)  # type: ignore[misc]
            rate = num_bytes / ours / 1e12
            yield {
                "name": name, "rows": m, "us": ours * 1e6, "tb_per_s": rate, "of_copy": rate / copy_tb_per_s,
                "cublas_us": cublas * 1e6, "speedup": cublas / ours,
            }  # fmt: skip


def decode_attention(
    ops: TritonOps, shape: ModelShape, batches: Sequence[int], contexts: Sequence[int], copy_tb_per_s: float
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
                caches = [
                    make.cache(num_slots(batch), shape.num_kv_heads, shape.head_dim, dtype)
                    for _ in range(_num_copies(num_bytes))
                ]
                seconds = seconds_per_call(
                    [lambda kv=kv, q=q, batch=batch: ops.attention(q, kv, batch, 0.1, None) for kv in caches],  # type: ignore[misc]
                    ops.device,
                )
                rate = num_bytes / seconds / 1e12
                yield {
                    "cache": kind, "batch": size, "context": context, "us": seconds * 1e6, "tb_per_s": rate,
                    "of_copy": rate / copy_tb_per_s,
                }  # fmt: skip


def _num_copies(num_bytes: int) -> int:
    return min(_MAX_COPIES, -(-_COLD_BYTES // num_bytes))
