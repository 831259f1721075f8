"""Every operation of `TritonOps` against the reference in float64, with an error bound derived from the dtype.

The same code runs on a GPU with LLaMA's shapes and, in Triton's interpreter, on the CPU with tiny ones.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import Maker, as_float64, context_slots, num_slots
from kernels.gpu.configs import DECODE_ROWS
from kernels.ops import AttentionBatch, HeadTransform, LayerKv
from kernels.reference import ReferenceOps, store
from kernels.weights import LinearWeight, LowRankWeight


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

    def groups(self) -> dict[str, Callable[[], Iterator[Check]]]:
        """The checks by name: what may run (and fail) apart from the rest."""
        s = self.shapes
        return {
            "embed": self._embed,
            "add_linear": self._add_linear,
            "attention_input": self._attention_input,
            "mlp_input": self._mlp_input,
            "norms": self._norms,
            "int8 prefill": self._int8_prefill,
            "attention": partial(self._attention, False, None),
            "attention, window": partial(self._attention, False, s.window),
            "attention, int8 cache": partial(self._attention, True, None),
            "attention, int8 cache, window": partial(self._attention, True, s.window),
        }

    def run(self, only: str | None = None) -> Iterator[Check]:
        """One result per operation and shape, of one group or of all; an exception becomes a failed check."""
        for name, group in self.groups().items():
            if only in (None, name):
                try:
                    yield from group()
                except Exception:  # one broken kernel must not hide the verdict on the others
                    yield Check(name, float("nan"), 0.0, traceback.format_exc()[-2000:])

    def _check(self, name: str, got: Tensor, want: Tensor, roundings: int, terms: int) -> Check:
        limit = error_limit(self.ops.dtype, self.ops.device, roundings, terms)
        return Check(name, relative_error(got, want), limit)

    def _embed(self) -> Iterator[Check]:
        s = self.shapes
        ids = torch.arange(s.vocab - 1, -1, -7, device=self.ops.device)
        for name, table in (("int8", self.make.int8(s.vocab, s.hidden)), ("int4", self.make.int4(s.vocab, s.hidden))):
            prepared = self.ops.prepare_embedding(table, tied_head=True)
            yield self._check(f"embed {name}", self.ops.embed(ids, prepared), self.reference.embed(ids, table), 1, 1)
            x = self.make.normal(3, s.hidden, dtype=self.ops.dtype)
            want = self.reference.linear(x.double(), table)
            yield self._check(f"logits, tied {name} table", self.ops.logits(x, prepared), want, 0, s.hidden)

    def _add_linear(self) -> Iterator[Check]:
        s = self.shapes
        weights: dict[str, tuple[LinearWeight, int]] = {
            "int8": (self.make.int8(s.hidden, s.hidden, bias=True), 1),
            "int8, odd input": (self.make.int8(s.hidden, s.width), 1),
            f"rank {s.rank}": (self.make.low_rank(s.hidden, s.hidden, s.rank, bias=True), 2),
            "rank 1": (self.make.low_rank(s.hidden, s.hidden, 1), 2),
            "dense": (self.make.dense(s.hidden, s.hidden, self.ops.dtype), 1),
            "int4": (self.make.int4(s.hidden, s.hidden, bias=True), 1),
            "int4, odd input, zero points": (self.make.int4(s.hidden, s.width, 32, False), 1),
            f"int4 of rank {s.rank}": (
                LowRankWeight(self.make.int4(s.rank, s.hidden), self.make.int4(s.hidden, s.rank, 64, False)),
                2,
            ),
            "int4, corrected": (self.make.corrected(self.make.int4(s.hidden, s.hidden), 16), 3),
        }
        for name, (weight, roundings) in weights.items():
            prepared = self.ops.prepare_linear(weight)
            for rows in s.rows:
                x, h = (self.make.normal(rows, n, dtype=self.ops.dtype) for n in (weight.shape[1], s.hidden))
                want = self.reference.add_linear(h.double(), x.double(), weight)
                got = self.ops.add_linear(h.clone(), x, prepared)
                yield self._check(f"add_linear {name}, {rows} rows", got, want, roundings, weight.shape[1])
                same = torch.equal(got, self.ops.add_linear(h.clone(), x, prepared))
                yield Check(f"add_linear {name}, {rows} rows: same bits again", 0.0 if same else 1.0, 0.0)

    def _attention_input(self) -> Iterator[Check]:
        s, d = self.shapes, self.shapes.head_dim
        q = self.make.int8(s.num_q_heads * d, s.hidden)
        k, v = (self.make.low_rank(s.num_kv_heads * d, s.hidden, s.rank + i) for i in (0, 1))
        plain = [self.make.int8(s.num_kv_heads * d, s.hidden, bias=True) for _ in range(2)]
        low_rank = self.make.low_rank(s.num_q_heads * d, s.hidden, s.rank)
        dense = self.make.dense(s.num_kv_heads * d, s.hidden, self.ops.dtype)
        norm = self.make.norm(s.hidden, self.ops.dtype)
        int4 = tuple(self.make.int4(n * d, s.hidden, 64) for n in (s.num_q_heads, s.num_kv_heads, s.num_kv_heads))
        pairs = tuple(LowRankWeight(self.make.int4(s.rank, s.hidden), self.make.int4(w.shape[0], s.rank)) for w in int4)
        for name, weights in (
            ("int8", (q, *plain)), ("low rank", (low_rank, k, v)), ("mixed", (q, k, plain[0])),
            ("float", (q, k, dense)), ("int4", int4), ("int4 low rank", pairs),
            ("int4 corrected", tuple(self.make.corrected(w, 16) for w in int4)),
        ):  # fmt: skip
            prepared = self.ops.prepare_qkv(*weights)
            for rows, cache in zip(s.rows, [self.ops.dtype, torch.int8] * len(s.rows), strict=False):
                label = f"attention_input {name}, {rows} rows, {str(cache).removeprefix('torch.')} cache"
                h, heads = 3 * self.make.normal(rows, s.hidden, dtype=self.ops.dtype), self._heads(rows, name == "int8")
                kv, exact = (self.make.cache(rows + 3, s.num_kv_heads, d, t) for t in (cache, torch.float64))
                slots = torch.arange(rows + 2, 2, -1, device=self.ops.device)
                got = self.ops.attention_input(h, norm, prepared, heads, kv, slots)
                want = self.reference.attention_input(h.double(), norm, weights, heads, exact, slots)
                # Roundings: of x times the norm's weight, between two factors, of the result; of a main product and of
                # the sum with its correction.
                roundings = 5 if "corrected" in name else 3
                yield self._check(f"{label}: q", got, want, roundings, s.hidden)
                yield from self._cached(label, kv, exact, slots, roundings, s.hidden)

    def _mlp_input(self) -> Iterator[Check]:
        s, make = self.shapes, self.make
        for kind, matrix in (("int8", make.int8), ("int4", make.int4)):
            pair, norm = (matrix(s.width, s.hidden), matrix(s.width, s.hidden)), make.norm(s.hidden, self.ops.dtype)
            prepared, down = self.ops.prepare_gate_up(*pair), matrix(s.hidden, s.width)
            prepared_down = self.ops.prepare_linear(down)
            for rows in s.rows:
                h = 3 * make.normal(rows, s.hidden, dtype=self.ops.dtype)
                hidden, want = self.ops.mlp_input(h, norm, prepared), self.reference.mlp_input(h.double(), norm, pair)
                # One rounding of the result, one of the normed input: it reaches the result once through up and, as
                # |g silu'(g) / silu(g)| < 2 where silu is not negligible, at most twice through gate.
                yield self._check(f"mlp_input {kind}, {rows} rows", hidden, want, 4, 4 * s.hidden)
                got, want = self.ops.add_linear(h.clone(), hidden, prepared_down), hidden.double()
                want = self.reference.add_linear(h.double(), want, down)
                yield self._check(f"add_linear down {kind}, {rows} rows", got, want, 1, s.width)
        low_rank = tuple(make.low_rank(s.width, s.hidden, s.rank) for _ in range(2))
        dense = tuple(make.dense(s.width, s.hidden, self.ops.dtype) for _ in range(2))
        # Not fused: gate (counted twice, as above) and up are rounded too, and so is what is between two factors.
        kinds: dict[str, tuple[tuple[LinearWeight, ...], int]] = {"low rank": (low_rank, 10), "float": (dense, 7)}
        for name, (weights, roundings) in kinds.items():
            gate, up = weights
            prepared = self.ops.prepare_gate_up(gate, up)
            for rows in s.rows:
                h = 3 * make.normal(rows, s.hidden, dtype=self.ops.dtype)
                got, want = self.ops.mlp_input(h, norm, prepared), self.reference.mlp_input(h.double(), norm, weights)
                yield self._check(f"mlp_input {name}, {rows} rows", got, want, roundings, 4 * s.hidden)

    def _int8_prefill(self) -> Iterator[Check]:
        """Against the emulation: at most a few values per thousand round to the other side of a tie, by a step, of
        which a row has 127 up to its absmax, at most 6 times its root mean square here."""
        s, rows = self.shapes, DECODE_ROWS + 6
        ops = TritonOps(self.ops.device, self.ops.dtype, int8_prefill=True)
        reference = ReferenceOps(self.ops.device, torch.float64, int8_prefill_above=DECODE_ROWS)
        norm, ties = self.make.norm(s.hidden, ops.dtype), 6 / 127 * 0.005**0.5
        h, x = (self.make.normal(rows, n, dtype=ops.dtype) for n in (s.hidden, s.width))
        down = self.make.int8(s.hidden, s.width, bias=True)
        got = ops.add_linear(h.clone(), x, ops.prepare_linear(down))
        check = self._check("add_linear", got, reference.add_linear(h.double(), x.double(), down), 1, s.width)
        yield replace(check, limit=check.limit + ties)
        pair = (self.make.int8(s.width, s.hidden), self.make.int8(s.width, s.hidden))
        got = ops.mlp_input(h, norm, ops.prepare_gate_up(*pair))
        check = self._check("mlp_input", got, reference.mlp_input(h.double(), norm, pair), 4, 4 * s.hidden)
        yield replace(check, limit=check.limit + 3 * ties)

    def _norms(self) -> Iterator[Check]:
        x, norm = (
            self.make.normal(7, self.shapes.hidden, dtype=self.ops.dtype),
            self.make.norm(self.shapes.hidden, self.ops.dtype),
        )
        want = self.reference.rms_norm(x.double(), norm.weight, norm.eps)
        yield self._check("rms_norm", self.ops.rms_norm(x, norm.weight, norm.eps), want, 1, self.shapes.hidden)

    def _heads(self, rows: int, norms: bool) -> HeadTransform:
        return self.make.heads(rows, self.shapes.head_dim, self.ops.dtype, norms)

    def _cached(
        self, label: str, kv: LayerKv, exact: LayerKv, slots: Tensor, roundings: int, terms: int
    ) -> Iterator[Check]:
        """What was written to the cache. An int8 step is absmax / 127, its rounding error uniform in +-step / 2; absmax
        is at most sqrt(D) times the root mean square of the head: the error stays below sqrt(D) / (127 * sqrt(12))."""
        int8_limit = 0.0 if kv.key_scale is None else self.shapes.head_dim**0.5 / (127 * 12**0.5)
        stored = as_float64(kv)
        for name, got, ideal in (("k", stored.key, exact.key), ("v", stored.value, exact.value)):
            check = self._check(f"{label}: {name}", got[slots], ideal[slots], roundings, terms)
            yield replace(check, limit=check.limit + int8_limit)
            untouched = torch.ones(len(got), dtype=torch.bool, device=slots.device)
            untouched[slots] = False
            yield Check(f"{label}: {name} elsewhere", float(not got[untouched].isnan().all()), 0.0)

    def _attention(self, int8: bool, window: int | None) -> Iterator[Check]:
        s = self.shapes
        queries, contexts = [1] * len(s.contexts) + [s.chunk[0]], [*s.contexts, s.chunk[1]]
        batch = self.make.batch(queries, contexts)
        dtype = torch.int8 if int8 else self.ops.dtype
        kv = self.make.cache(num_slots(batch), s.num_kv_heads, s.head_dim, dtype)
        label = f"{'int8' if int8 else '16-bit'} cache, window {window}"
        self._fill(batch, kv)
        q = self.make.normal(batch.query_starts_host[-1], s.num_q_heads, s.head_dim, dtype=self.ops.dtype)
        got = self.ops.attention(q, kv, batch, s.head_dim**-0.5, window)
        want = self.reference.attention(q.double(), as_float64(kv), batch, s.head_dim**-0.5, window)
        d, terms = batch.num_decodes, s.head_dim + max(contexts)
        yield self._check(f"decode attention, {label}", got[:d], want[:d], 2, terms)
        yield self._check(f"prefill attention, {label}", got[d:], want[d:], 2, terms)

    def _fill(self, batch: AttentionBatch, kv: LayerKv) -> None:
        """Write every context to its slots by the reference; all other slots keep their poison."""
        s, tables = self.shapes, batch.block_tables
        slots = torch.cat(
            [context_slots(tables[i], batch.block_size, n) for i, n in enumerate(batch.context_lens_host)]
        )
        k, v = (self.make.normal(len(slots), s.num_kv_heads, s.head_dim, dtype=self.ops.dtype) for _ in range(2))
        store(k, kv.key, kv.key_scale, slots)
        store(v, kv.value, kv.value_scale, slots)
