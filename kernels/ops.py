"""The only door to tensor code: the operations a LLaMA needs, and which implementation serves a device.

Not an implementation: `reference` defines what is correct, `cpu` and `gpu` are fast. Weights are prepared once by
the implementation that will use them; what `prepare_*` returns is opaque and belongs to it.

Shapes: T tokens of a step over all sequences, S sequences, HQ query heads, HKV key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from kernels.weights import Leaf, LinearWeight

if TYPE_CHECKING:
    from kernels.layers import Layer

BackendName = Literal["auto", "reference", "cpu", "native", "triton"]


@dataclass(slots=True)
class LayerKv:
    """Key/value cache of one layer, token-major; a page is `block_size` consecutive slots."""

    key: Tensor  # [num_slots, HKV, D]; int8, float16, bfloat16 or float32
    value: Tensor  # [num_slots, HKV, D], same dtype
    key_scale: Tensor | None = None  # float32 [num_slots, HKV] where the cache is int8: key ~ q * scale
    value_scale: Tensor | None = None  # float32 [num_slots, HKV]


@dataclass(slots=True)
class Norm:
    """Root mean square norm of one layer: x / rms(x) * weight (Zhang & Sennrich 2019, eq. 4)."""

    weight: Tensor  # [n]
    eps: float


@dataclass(slots=True)
class HeadTransform:
    """What happens to query and key heads between their projection and the cache: norms (Qwen3), then rotation."""

    cos: Tensor  # float32 [T, D/2], half-split pairs as in Hugging Face's LLaMA
    sin: Tensor
    q_norm: Norm | None = None  # over D
    k_norm: Norm | None = None


@dataclass(slots=True)
class AttentionBatch:
    """Where each token of a step belongs. Sequences that decode (one token each) stand first.

    Sequence s has its `query_starts[s] .. query_starts[s+1]` tokens in this step; they are the last ones of its
    `context_lens[s]` tokens, all of which are in the cache once `store` ran. Host copies are kept for code that
    loops over sequences.
    """

    slots: Tensor  # int64 [T]: cache slot of each token
    block_tables: Tensor  # int32 [S, max_blocks]: page numbers, unused entries 0
    context_lens: Tensor  # int32 [S]
    query_starts: Tensor  # int32 [S + 1]
    context_lens_host: list[int]
    query_starts_host: list[int]
    block_size: int
    num_decodes: int  # the first `num_decodes` sequences have exactly one token
    max_query_len: int
    max_context_len: int
    scratch: dict[Any, Any] = field(default_factory=dict)  # what a back end derives from the above, once for all layers


class Ops(Protocol):
    """What every back end implements. Activations are 2-D [T, features], contiguous where nothing else is said."""

    name: str
    device: torch.device
    dtype: torch.dtype  # of activations

    def use_threads(self, count: int) -> None:
        """Let `count` CPU threads work from now on."""
        ...

    def prepare_linear(self, weight: LinearWeight) -> Any:
        """Lay out one matrix. Raises ValueError when shapes disagree."""
        ...

    def prepare_qkv(self, q: LinearWeight, k: LinearWeight, v: LinearWeight) -> Any:
        """Lay out the three projections that share an input."""
        ...

    def prepare_gate_up(self, gate: LinearWeight, up: LinearWeight) -> Any:
        """Lay out the two MLP projections that share an input."""
        ...

    def prepare_embedding(self, weight: Leaf, tied_head: bool = False) -> Any:
        """Lay out a table [vocab, hidden]; with `tied_head` what is returned may be given to `logits` as well."""
        ...

    def nbytes(self, prepared: Any) -> int:
        """Bytes resident for what a `prepare_*` returned (layout and padding included)."""
        ...

    def embed(self, token_ids: Tensor, table: Any) -> Tensor:
        """token_ids int64 [T] -> [T, hidden]."""
        ...

    def run_layers(
        self, h: Tensor, layers: Sequence[Layer], cos: Tensor, sin: Tensor, cache: Sequence[LayerKv],
        batch: AttentionBatch, scale: float,
    ) -> Tensor:  # fmt: skip
        """The residual stream h [T, hidden], which may be overwritten, after all layers: what follows, layer by layer.

        cos, sin float32 [T, D/2] of the tokens' positions; one cache per layer; `scale` of the scores.
        """
        ...

    def attention_input(
        self, h: Tensor, norm: Norm, weight: Any, heads: HeadTransform, kv: LayerKv, slots: Tensor
    ) -> Tensor:
        """Norm, project to q, k, v, transform the heads, write k and v to `slots` of the cache: everything before
        attention. h [T, hidden] is left as it is -> q [T, HQ, D]."""
        ...

    def attention(self, q: Tensor, kv: LayerKv, batch: AttentionBatch, scale: float, window: int | None) -> Tensor:
        """Causal attention of q [T, HQ, D] over the paged cache -> [T, HQ * D]. With a window, a token sees itself
        and the window - 1 tokens before it."""
        ...

    def add_linear(self, h: Tensor, x: Tensor, weight: Any) -> Tensor:
        """h + x W^T: x [T, in] added to the residual stream h [T, hidden], which may be overwritten and returned."""
        ...

    def mlp_input(self, h: Tensor, norm: Norm, weight: Any) -> Tensor:
        """silu(n gate^T) * (n up^T) of n = norm(h): h [T, hidden] is left as it is -> [T, width], which may be a view
        with padded rows: give it to `add_linear` as it is."""
        ...

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """x [T, in] -> [T, out]; `weight` from prepare_linear. Outside of a step: layers have the fused ones above."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., n] / rms(x) * weight [n]; statistics in float32."""
        ...

    def logits(self, x: Tensor, weight: Any) -> Tensor:
        """x [T, hidden] -> float32 [T, vocab]; `weight` from prepare_linear, or a tied table."""
        ...


def make_ops(
    device: torch.device, dtype: torch.dtype, backend: BackendName = "auto", *, int8_prefill: bool = False
) -> Ops:
    """The implementation for a device: Triton on CUDA; elsewhere the compiled one where it was built and passes its
    test, else the portable one; unless one is named.

    `int8_prefill` lets long steps multiply int8 activations (Triton only).

    Raises ValueError for a name that is none of `BackendName` or an option that the back end does not have,
    RuntimeError where the device cannot run it.
    """
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else _cpu_backend()
    if backend == "triton":
        from kernels.gpu.backend import TritonOps  # imports triton: absent on machines without it

        return TritonOps(device, dtype, int8_prefill=int8_prefill)
    if int8_prefill:
        raise ValueError(f"int8 activations for prompts need the triton backend, this is {backend}")
    if backend == "native":
        from kernels.native.backend import NativeOps

        return NativeOps(device, dtype)
    if backend == "cpu":
        from kernels.cpu import CpuOps

        return CpuOps(device, dtype)
    if backend == "reference":
        from kernels.reference import ReferenceOps

        return ReferenceOps(device, dtype)
    raise ValueError(f"backend {backend!r} is none of auto, reference, cpu, native, triton")


def _cpu_backend() -> BackendName:
    from kernels.native.library import machine_choice

    return "cpu" if machine_choice().library is None else "native"
