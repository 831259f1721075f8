"""Every operation of `TritonOps` against the reference in float64, with an error bound derived from the dtype.

The same code runs on a GPU with LLaMA's shapes and, in Triton's interpreter, on the CPU with tiny ones.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import Maker, as_float64, context_slots, num_slots
from kernels.ops import AttentionBatch, LayerKv
from kernels.reference import ReferenceOps
from kernels.weights import LinearWeight

EPS = 1e-5  # of the norms


@dataclass(frozen=True, slots=True)
class CheckShapes:
    """Sizes of one run of checks."""

    hidden: int
    width: int
    rank: int
    vocab: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rows: tuple[int, ...]
    contexts: tuple[int, ...]  # of decoding sequences
    chunk: tuple[int, int]  # (new tokens, context) of a prefill chunk
    window: int


LLAMA = CheckShapes(4096, 10457, 1331, 32000, 32, 8, 128, (1, 4, 17, 64, 300), (1, 200, 3000), (300, 700), 150)
TINY = CheckShapes(72, 40, 3, 50, 4, 2, 16, (1, 5), (1, 300), (5, 20), 7)


@dataclass(frozen=True, slots=True)
class Check:
    """Relative error (Frobenius norm) of one operation, and what it may be."""

    name: str
    error: float
    limit: float
    detail: str = ""  # of an exception

    @property
    def ok(self) -> bool:
        """False for NaN as well."""
        return self.error <= self.limit


def rounding_unit(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative error of one rounding: eps / 2, or eps for bf16 in the interpreter, which truncates."""
    truncates = dtype == torch.bfloat16 and device.type == "cpu"
    eps: float = torch.finfo(dtype).eps
    return eps if truncates else eps / 2


def error_limit(dtype: torch.dtype, device: torch.device, roundings: int, terms: int) -> float:
    """Bound on the relative error: each rounding to `dtype` costs at most its unit; a float32 sum of n terms errs by
    about sqrt(n) float32 units (random signs, Higham 2002 section 4.2), here doubled, plus 8 for exp and division."""
    sums: float = (2 * terms**0.5 + 8) * torch.finfo(torch.float32).eps / 2
    return roundings * rounding_unit(dtype, device) + sums


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; inf when shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    error: float = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return error


class CorrectnessChecks:
    """All checks of one dtype on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shapes: CheckShapes) -> None:
        self.ops = TritonOps(device, dtype)
        self.reference = ReferenceOps(device, torch.float64)
        self.shapes = shapes
        self.make = Maker(device)

    def run(self) -> Iterator[Check]:
        """One result per operation and shape; an exception becomes a failed check."""
        for group in (self._embed, self._linear, self._qkv, self._mlp, self._norms):
            yield from self._guarded(group)
        for int8 in (False, True):
            for window in (None, self.shapes.window):
                yield from self._guarded(partial(self._attention, int8, window))

    def _guarded(self, group: Callable[[], Iterator[Check]]) -> Iterator[Check]:
        try:
            yield from group()
        except Exception:  # one broken kernel must not hide the verdict on the others
            name = getattr(group, "__name__", "attention").strip("_")
            yield Check(name, float("nan"), 0.0, traceback.format_exc()[-2000:])

    def _check(self, name: str, got: Tensor, want: Tensor, roundings: int, terms: int) -> Check:
        limit = error_limit(self.ops.dtype, self.ops.device, roundings, terms)
        return Check(name, relative_error(got, want), limit)

    def _embed(self) -> Iterator[Check]:
        s, table = self.shapes, self.make.int8(self.shapes.vocab, self.shapes.hidden)
        ids = torch.arange(s.vocab - 1, -1, -7, device=self.ops.device)
        prepared = self.ops.prepare_embedding(table, tied_head=True)
        yield self._check("embed int8", self.ops.embed(ids, prepared), self.reference.embed(ids, table), 1, 1)
        x = self.make.normal(3, s.hidden, dtype=self.ops.dtype)
        want = self.reference.linear(x.double(), table)
        yield self._check("logits, tied int8 table", self.ops.logits(x, prepared), want, 0, s.hidden)

    def _linear(self) -> Iterator[Check]:
        s = self.shapes
        weights: dict[str, tuple[LinearWeight, int]] = {
            "int8": (self.make.int8(s.width, s.hidden, bias=True), 1),
            "int8, odd input": (self.make.int8(s.hidden, s.width), 1),
            f"rank {s.rank}": (self.make.low_rank(s.hidden, s.hidden, s.rank, bias=True), 2),
            "rank 1": (self.make.low_rank(s.hidden, s.hidden, 1), 2),
            "dense": (self.make.dense(s.hidden, s.hidden, self.ops.dtype), 1),
        }
        for name, (weight, roundings) in weights.items():
            prepared = self.ops.prepare_linear(weight)
            for rows in s.rows:
                x = self.make.normal(rows, weight.shape[1], dtype=self.ops.dtype)
                got, want = self.ops.linear(x, prepared), self.reference.linear(x.double(), weight)
                yield self._check(f"linear {name}, {rows} rows", got, want, roundings, weight.shape[1])

    def _qkv(self) -> Iterator[Check]:
        s = self.shapes
        kv_width = s.num_kv_heads * s.head_dim
        q = self.make.int8(s.num_q_heads * s.head_dim, s.hidden)
        k = self.make.low_rank(kv_width, s.hidden, s.rank)
        for name, v in (
            ("int8", self.make.low_rank(kv_width, s.hidden, s.rank + 1)),
            ("mixed", self.make.dense(kv_width, s.hidden, self.ops.dtype)),
        ):
            prepared = self.ops.prepare_qkv(q, k, v)
            for rows in s.rows:
                x = self.make.normal(rows, s.hidden, dtype=self.ops.dtype)
                outputs = zip("qkv", self.ops.qkv(x, prepared), self.reference.qkv(x.double(), (q, k, v)), strict=True)
                for part, got, want in outputs:
                    yield self._check(f"qkv {name}: {part}, {rows} rows", got, want, 2, s.hidden)

    def _mlp(self) -> Iterator[Check]:
        s = self.shapes
        pair = (self.make.int8(s.width, s.hidden), self.make.int8(s.width, s.hidden))
        down = self.make.int8(s.hidden, s.width)
        prepared, prepared_down = self.ops.prepare_gate_up(*pair), self.ops.prepare_linear(down)
        for rows in s.rows:
            x = self.make.normal(rows, s.hidden, dtype=self.ops.dtype)
            hidden, want = self.ops.gate_up_silu(x, prepared), self.reference.gate_up_silu(x.double(), pair)
            yield self._check(f"gate_up_silu, {rows} rows", hidden, want, 1, 4 * s.hidden)
            got = self.ops.linear(hidden, prepared_down)
            yield self._check(f"down, {rows} rows", got, self.reference.linear(hidden.double(), down), 1, s.width)

    def _norms(self) -> Iterator[Check]:
        n, dtype = self.shapes.hidden, self.ops.dtype
        x, residual = self.make.normal(7, n, dtype=dtype), self.make.normal(7, n, dtype=dtype)
        weight = self.make.normal(n, dtype=dtype)
        want = self.reference.rms_norm(x.double(), weight.double(), EPS)
        yield self._check("rms_norm", self.ops.rms_norm(x, weight, EPS), want, 1, n)
        want, total = self.reference.add_rms_norm(x.double(), residual.double(), weight.double(), EPS)
        got, got_total = self.ops.add_rms_norm(x, residual.clone(), weight, EPS)
        yield self._check("add_rms_norm", got, want, 2, n)
        yield self._check("add_rms_norm: sum", got_total, total, 1, 1)

    def _attention(self, int8: bool, window: int | None) -> Iterator[Check]:
        s = self.shapes
        queries, contexts = [1] * len(s.contexts) + [s.chunk[0]], [*s.contexts, s.chunk[1]]
        batch = self.make.batch(queries, contexts)
        dtype = torch.int8 if int8 else self.ops.dtype
        kv = self.make.cache(num_slots(batch), s.num_kv_heads, s.head_dim, dtype)
        label = f"{'int8' if int8 else '16-bit'} cache, window {window}"
        yield from self._fill(batch, kv, label)
        q = self.make.normal(batch.query_starts_host[-1], s.num_q_heads, s.head_dim, dtype=self.ops.dtype)
        got = self.ops.attention(q, kv, batch, s.head_dim**-0.5, window)
        want = self.reference.attention(q.double(), as_float64(kv), batch, s.head_dim**-0.5, window)
        d, terms = batch.num_decodes, s.head_dim + max(contexts)
        yield self._check(f"decode attention, {label}", got[:d], want[:d], 2, terms)
        yield self._check(f"prefill attention, {label}", got[d:], want[d:], 2, terms)

    def _fill(self, batch: AttentionBatch, kv: LayerKv, label: str) -> Iterator[Check]:
        """Write the context by the reference and the tokens of this step by `rotary_store`; check what that did."""
        s, tables = self.shapes, batch.block_tables
        old = torch.cat([context_slots(tables[i], batch.block_size, n) for i, n in enumerate(batch.context_lens_host)])
        heads = (s.num_q_heads, s.num_kv_heads, s.num_kv_heads)
        for slots, rotary_store in ((old, self.reference.rotary_store), (batch.slots, self.ops.rotary_store)):
            cos, sin = self.make.angles(len(slots), s.head_dim)
            q, k, v = (self.make.normal(len(slots), h, s.head_dim, dtype=self.ops.dtype) for h in heads)
            rotated = rotary_store(q, k, v, cos, sin, kv, slots)
        exact = self.make.cache(num_slots(batch), s.num_kv_heads, s.head_dim, torch.float64)
        want = self.reference.rotary_store(q.double(), k.double(), v.double(), cos.double(), sin.double(), exact, slots)
        yield self._check(f"rotary_store q, {label}", rotated, want, 1, 2)
        # An int8 step is absmax / 127, its rounding error uniform in +-step / 2; absmax is at most sqrt(D) times the
        # root mean square of the head, so the relative error stays below sqrt(D) / (127 * sqrt(12)).
        int8_limit = s.head_dim**0.5 / (127 * 12**0.5)
        stored = as_float64(kv)
        for name, got, ideal in (("k", stored.key, exact.key), ("v", stored.value, exact.value)):
            check = self._check(f"rotary_store {name}, {label}", got[slots], ideal[slots], 1, 2)
            yield check if kv.key_scale is None else Check(check.name, check.error, int8_limit)
