"""A decoder of random weights in LLaMA's shape, run over `Ops` alone: what one token costs, what stays resident.

Not the server's model (`kernels` imports nothing above it) and no text: only the sequence of operations of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import NORM_EPS, Maker, num_slots
from kernels.gpu.check_speed import seconds_per_call
from kernels.gpu.plan import ModelShape
from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm
from kernels.weights import LinearWeight

_ROPE_THETA = 10000.0
VARIANTS = ("float", "int8", "spq")


@dataclass(slots=True)
class DecoderLayer:
    """Prepared weights of one layer."""

    qkv: Any
    o: Any
    gate_up: Any
    down: Any
    input_norm: Norm
    mlp_norm: Norm


@dataclass(slots=True)
class Decoder:
    """Prepared weights of all layers."""

    shape: ModelShape
    table: Any
    layers: list[DecoderLayer]
    norm: Norm
    head: Any


def random_decoder(ops: TritonOps, shape: ModelShape, variant: str) -> Decoder:
    """Random weights of unit gain: "float" (dtype of `ops`), "int8", or "spq" (int8, attention of low rank, pruned)."""
    make = Maker(ops.device)
    kv_width = shape.num_kv_heads * shape.head_dim
    width = shape.pruned_width if variant == "spq" else shape.width

    def matrix(out: int, inner: int, rank: int = 0) -> LinearWeight:
        if variant == "float":
            return make.dense(out, inner, ops.dtype)
        return make.low_rank(out, inner, rank) if variant == "spq" and rank else make.int8(out, inner)

    def layer() -> DecoderLayer:
        h, q_width = shape.hidden, shape.num_q_heads * shape.head_dim
        ranks = (shape.rank, shape.kv_rank, shape.kv_rank)
        qkv = [matrix(n, h, rank) for n, rank in zip((q_width, kv_width, kv_width), ranks, strict=True)]
        return DecoderLayer(
            qkv=ops.prepare_qkv(*qkv),
            o=ops.prepare_linear(matrix(h, q_width, shape.rank)),
            gate_up=ops.prepare_gate_up(matrix(width, h), matrix(width, h)),
            down=ops.prepare_linear(matrix(h, width)),
            input_norm=ones(),
            mlp_norm=ones(),
        )

    def ones() -> Norm:
        return Norm(torch.ones(shape.hidden, dtype=ops.dtype, device=ops.device), NORM_EPS)

    embedding = make.dense(shape.vocab, shape.hidden, ops.dtype)
    if variant != "float":
        embedding = make.int8(shape.vocab, shape.hidden)  # type: ignore[assignment]
    head = ops.prepare_linear(matrix(shape.vocab, shape.hidden))
    return Decoder(shape, ops.prepare_embedding(embedding), [layer() for _ in range(shape.layers)], ones(), head)


class DecodeState:
    """Caches and positions of a batch; a step changes them in place, so that it can be a CUDA graph."""

    def __init__(self, ops: TritonOps, shape: ModelShape, batch_size: int, context: int, max_len: int) -> None:
        """`context` tokens are taken as cached already (zeros)."""
        make = Maker(ops.device)
        self.batch: AttentionBatch = make.batch([1] * batch_size, [max_len] * batch_size)
        self.batch.context_lens.fill_(context)
        kv_shape = (num_slots(self.batch), shape.num_kv_heads, shape.head_dim)
        self.caches = [
            LayerKv(*(torch.zeros(kv_shape, dtype=ops.dtype, device=ops.device) for _ in range(2)))
            for _ in range(shape.layers)
        ]
        self.token_ids = torch.arange(batch_size, device=ops.device) % shape.vocab
        inverse = _ROPE_THETA ** -(torch.arange(0, shape.head_dim, 2, device=ops.device).float() / shape.head_dim)
        angles = torch.arange(max_len, device=ops.device).float()[:, None] * inverse
        self.cos, self.sin = angles.cos(), angles.sin()

    def advance(self) -> tuple[Tensor, Tensor]:
        """Make room for one more token of every sequence; cos and sin [S, D/2] of its position."""
        batch = self.batch
        positions = batch.context_lens.long()
        pages = batch.block_tables.gather(1, (positions // batch.block_size)[:, None])[:, 0].long()
        batch.slots.copy_(pages * batch.block_size + positions % batch.block_size)
        batch.context_lens.add_(1)
        return self.cos[positions], self.sin[positions]


def decode_step(ops: TritonOps, model: Decoder, state: DecodeState) -> Tensor:
    """One token for every sequence; returns the logits float32 [S, vocab] and keeps the most likely ids."""
    shape, batch = model.shape, state.batch
    heads = HeadTransform(*state.advance())
    h = ops.embed(state.token_ids, model.table)
    for layer, kv in zip(model.layers, state.caches, strict=True):
        q = ops.attention_input(h, layer.input_norm, layer.qkv, heads, kv, batch.slots)
        attended = ops.attention(q, kv, batch, shape.head_dim**-0.5, None)
        h = ops.add_linear(h, attended, layer.o)
        h = ops.add_linear(h, ops.mlp_input(h, layer.mlp_norm, layer.gate_up), layer.down)
    logits = ops.logits(ops.rms_norm(h, model.norm.weight, model.norm.eps), model.head)
    state.token_ids.copy_(logits.argmax(-1))
    return logits


def measure_decoding(
    ops: TritonOps, shape: ModelShape, variant: str, batch_sizes: Sequence[int], context: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Time of a step and memory of one variant, by batch size, launched from Python and as a CUDA graph; for the
    first size also each operation, and each kernel by the profiler. No steps: everything is compiled only."""
    cuda = ops.device.type == "cuda"
    model = random_decoder(ops, shape, variant)
    weights = torch.cuda.memory_allocated() if cuda else None
    for size in batch_sizes:
        state = DecodeState(ops, shape, size, context, context + 3 * steps + 16)
        finite = bool(decode_step(ops, model, state).isfinite().all())
        row: dict[str, Any] = {"model": shape.name, "variant": variant, "batch": size, "context": context, "ok": finite}
        if steps:
            row |= _rates("eager", _timed_eager(ops, model, state, steps), size)
        if steps and cuda:
            row |= _rates("graph", _timed_graph(ops, model, state, steps), size)
            free, total = torch.cuda.mem_get_info()
            row |= {"weights_bytes": weights, "driver_used_bytes": total - free}
        yield row
        if steps and size == batch_sizes[0]:
            yield from operations(ops, model, state)
            if cuda:
                yield from profiled_kernels(ops, model, state)
        del state


def operations(ops: TritonOps, model: Decoder, state: DecodeState) -> Iterator[dict[str, Any]]:
    """Time of each operation of a layer, from a graph of that operation in all layers: launch gaps between kernels of
    one operation are counted, those of Python are not."""
    shape, batch, device = model.shape, state.batch, ops.device
    heads, size = HeadTransform(*state.advance()), len(state.token_ids)
    h = torch.randn(size, shape.hidden, device=device).to(ops.dtype)
    q = torch.randn(size, shape.num_q_heads, shape.head_dim, device=device).to(ops.dtype)
    wide = ops.mlp_input(h, model.layers[0].mlp_norm, model.layers[0].gate_up)
    pairs = list(zip(model.layers, state.caches, strict=True))
    calls: dict[str, list[Callable[[], object]]] = {
        "attention_input": [
            partial(ops.attention_input, h, w.input_norm, w.qkv, heads, kv, batch.slots) for w, kv in pairs
        ],
        "attention": [partial(ops.attention, q, kv, batch, 0.1, None) for _, kv in pairs],
        "add_linear o": [partial(ops.add_linear, h, q.flatten(1), w.o) for w, _ in pairs],
        "mlp_input": [partial(ops.mlp_input, h, w.mlp_norm, w.gate_up) for w, _ in pairs],
        "add_linear down": [partial(ops.add_linear, h, wide, w.down) for w, _ in pairs],
        "norm and logits": [
            lambda: ops.logits(ops.rms_norm(h, model.norm.weight, model.norm.eps), model.head)
        ],
    }  # fmt: skip
    for name, group in calls.items():
        us = seconds_per_call(group, device) * 1e6
        yield {"model": shape.name, "batch": size, "operation": name, "us": us, "per_step": len(group)}


def profiled_kernels(ops: TritonOps, model: Decoder, state: DecodeState) -> Iterator[dict[str, Any]]:
    """Launches and microseconds of each kernel in one step, as torch's profiler (CUPTI) sees them."""
    decode_step(ops, model, state)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decode_step(ops, model, state)
        torch.cuda.synchronize()
    for event in profile.key_averages():
        us = float(getattr(event, "device_time_total", 0.0))
        if us:
            yield {"kernel": event.key[:80], "launches": event.count, "us": us, "us_each": us / event.count}


def _rates(kind: str, seconds: float, size: int) -> dict[str, float]:
    return {f"{kind}_ms_per_token": seconds * 1e3, f"{kind}_tokens_per_s": size / seconds}


def _timed_eager(ops: TritonOps, model: Decoder, state: DecodeState, steps: int) -> float:
    decode_step(ops, model, state)
    _synchronize(ops.device)
    began = time.perf_counter()
    for _ in range(steps):
        decode_step(ops, model, state)
    _synchronize(ops.device)
    return (time.perf_counter() - began) / steps


def _timed_graph(ops: TritonOps, model: Decoder, state: DecodeState, steps: int) -> float:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        decode_step(ops, model, state)
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
