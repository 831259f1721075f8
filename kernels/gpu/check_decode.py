"""A decoder of random weights in LLaMA's shape, run over `Ops` alone: what one token costs, what stays resident.

Not the server's model (`kernels` imports nothing above it) and no text: only the sequence of operations of a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.gpu.backend import TritonOps
from kernels.gpu.check_data import Maker, num_slots
from kernels.ops import AttentionBatch, LayerKv
from kernels.weights import LinearWeight

_EPS = 1e-5
_ROPE_THETA = 10000.0
VARIANTS = ("float", "int8", "spq")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder; rank and pruned width are those of the SPQ variant."""

    layers: int
    hidden: int
    width: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    rank: int
    pruned_width: int


# Rank 1024 halves the int8 bytes of a 4096 x 4096 projection; 5 % of the MLP's neurons are pruned.
LLAMA_2_7B = ModelShape(32, 4096, 11008, 32, 32, 128, 32000, 1024, 10457)
TINY_MODEL = ModelShape(1, 64, 40, 4, 2, 16, 50, 3, 38)


@dataclass(slots=True)
class DecoderLayer:
    """Prepared weights of one layer."""

    qkv: Any
    o: Any
    gate_up: Any
    down: Any
    input_norm: Tensor
    mlp_norm: Tensor


@dataclass(slots=True)
class Decoder:
    """Prepared weights of all layers."""

    shape: ModelShape
    table: Any
    layers: list[DecoderLayer]
    norm: Tensor
    head: Any


def random_decoder(ops: TritonOps, shape: ModelShape, variant: str) -> Decoder:
    """Random weights of unit gain: "float" (dtype of `ops`), "int8", or "spq" (int8, attention of low rank, pruned)."""
    make = Maker(ops.device)
    kv_width = shape.num_kv_heads * shape.head_dim
    width = shape.pruned_width if variant == "spq" else shape.width

    def matrix(out: int, inner: int, attention: bool = False) -> LinearWeight:
        if variant == "float":
            return make.dense(out, inner, ops.dtype)
        return make.low_rank(out, inner, shape.rank) if variant == "spq" and attention else make.int8(out, inner)

    def layer() -> DecoderLayer:
        h, q_width = shape.hidden, shape.num_q_heads * shape.head_dim
        qkv = [matrix(n, h, attention=True) for n in (q_width, kv_width, kv_width)]
        return DecoderLayer(
            qkv=ops.prepare_qkv(*qkv),
            o=ops.prepare_linear(matrix(h, q_width, attention=True)),
            gate_up=ops.prepare_gate_up(matrix(width, h), matrix(width, h)),
            down=ops.prepare_linear(matrix(h, width)),
            input_norm=ones(),
            mlp_norm=ones(),
        )

    def ones() -> Tensor:
        return torch.ones(shape.hidden, dtype=ops.dtype, device=ops.device)

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
    cos, sin = state.advance()
    residual = ops.embed(state.token_ids, model.table)
    x = ops.rms_norm(residual, model.layers[0].input_norm, _EPS)
    norms = [layer.input_norm for layer in model.layers[1:]] + [model.norm]
    for layer, kv, next_norm in zip(model.layers, state.caches, norms, strict=True):
        q, k, v = (y.view(len(y), -1, shape.head_dim) for y in ops.qkv(x, layer.qkv))
        q = ops.rotary_store(q, k, v, cos, sin, kv, batch.slots)
        attended = ops.attention(q, kv, batch, shape.head_dim**-0.5, None)
        x, residual = ops.add_rms_norm(ops.linear(attended, layer.o), residual, layer.mlp_norm, _EPS)
        hidden = ops.gate_up_silu(x, layer.gate_up)
        x, residual = ops.add_rms_norm(ops.linear(hidden, layer.down), residual, next_norm, _EPS)
    logits = ops.logits(x, model.head)
    state.token_ids.copy_(logits.argmax(-1))
    return logits


def measure_decoding(
    ops: TritonOps, shape: ModelShape, variant: str, batch_sizes: tuple[int, ...], context: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Time of a step and memory of one variant, by batch size, launched from Python and as a CUDA graph."""
    cuda = ops.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = random_decoder(ops, shape, variant)
    weights = torch.cuda.memory_allocated() if cuda else None
    for size in batch_sizes:
        state = DecodeState(ops, shape, size, context, context + 3 * steps + 8)
        finite = bool(decode_step(ops, model, state).isfinite().all())
        row: dict[str, Any] = {"variant": variant, "batch": size, "context": context, "finite": finite}
        row |= _rates("eager", _timed_eager(ops, model, state, steps), size)
        if cuda:
            row |= _rates("graph", _timed_graph(ops, model, state, steps), size)
            free, total = torch.cuda.mem_get_info()
            row |= {
                "weights_bytes": weights,
                "peak_torch_bytes": torch.cuda.max_memory_allocated(),
                "driver_used_bytes": total - free,
            }
        yield row


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
