"""Random weights, caches and batches on which the operations of a back end are checked and timed.

Not tests and not timings: only the inputs, made the same way for both and for any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import AttentionBatch, HeadTransform, LayerKv, Norm
from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, Int8Weight, Leaf, LowRankWeight, pack_int4

NORM_EPS = 1e-5
_UNIFORM_INT8_STD = 73.3  # of integers uniform in [-127, 127]
_UNIFORM_INT4_STD = 4.6  # of integers uniform in 0..15


class Maker:
    """Makes data on one device from one seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, rounded to `dtype`."""
        return torch.randn(*shape, generator=self._generator, device=self.device).to(dtype)

    def int8(self, out_features: int, in_features: int, bias: bool = False) -> Int8Weight:
        """[out, in] of about unit gain: a standard normal input gives outputs of standard deviation about 1."""
        shape = (out_features, in_features)
        q = torch.randint(-127, 128, shape, generator=self._generator, device=self.device, dtype=torch.int8)
        spread = 0.5 + torch.rand(out_features, generator=self._generator, device=self.device)
        scale = spread / (_UNIFORM_INT8_STD * in_features**0.5)
        return Int8Weight(q, scale, self.normal(out_features) if bias else None)

    def int4(
        self, out_features: int, in_features: int, group: int = 128, symmetric: bool = True, bias: bool = False
    ) -> Int4Weight:
        """[out, in] of about unit gain in groups of inputs, without zero points where symmetric."""
        groups = -(-in_features // group)

        def integers(columns: int) -> Tensor:
            shape = (out_features, columns)
            return torch.randint(0, 16, shape, generator=self._generator, device=self.device, dtype=torch.uint8)

        spread = 0.5 + torch.rand(out_features, groups, generator=self._generator, device=self.device)
        scale = (spread / (_UNIFORM_INT4_STD * in_features**0.5)).half()
        zero = None if symmetric else integers(groups)
        q = pack_int4(integers(in_features))
        return Int4Weight(q, scale, zero, group, in_features, self.normal(out_features) if bias else None)

    def corrected(self, main: Leaf, rank: int) -> CorrectedWeight:
        """A matrix with an int8 correction of a fifth of its gain."""
        pair = self.low_rank(*main.shape, rank)
        assert isinstance(pair.up, Int8Weight)
        pair.up.scale *= 0.2
        return CorrectedWeight(main, pair)

    def dense(self, out_features: int, in_features: int, dtype: torch.dtype, bias: bool = False) -> DenseWeight:
        """[out, in] of unit gain, in `dtype`."""
        weight = (self.normal(out_features, in_features) * in_features**-0.5).to(dtype)
        return DenseWeight(weight, self.normal(out_features, dtype=dtype) if bias else None)

    def low_rank(self, out_features: int, in_features: int, rank: int, bias: bool = False) -> LowRankWeight:
        """An int8 pair of unit gain."""
        return LowRankWeight(self.int8(rank, in_features), self.int8(out_features, rank, bias))

    def cache(self, num_slots: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> LayerKv:
        """An empty cache full of poison: NaN, or NaN scales where int8, so that reading a wrong slot shows."""
        shape = (num_slots, num_heads, head_dim)
        if dtype == torch.int8:
            scales = [torch.full(shape[:2], float("nan"), device=self.device) for _ in range(2)]
            key, value = (torch.full(shape, 99, dtype=dtype, device=self.device) for _ in range(2))
            return LayerKv(key, value, *scales)
        key, value = (torch.full(shape, float("nan"), dtype=dtype, device=self.device) for _ in range(2))
        return LayerKv(key, value)

    def batch(self, query_lens: Sequence[int], context_lens: Sequence[int], block_size: int = 16) -> AttentionBatch:
        """Sequences on pages in random order; page 0 belongs to none. Those of one query stand first."""
        num_sequences, num_blocks = len(query_lens), -(-max(context_lens) // block_size)
        pages = torch.randperm(num_sequences * num_blocks, generator=self._generator, device=self.device) + 1
        tables = pages.view(num_sequences, num_blocks).int()
        starts = [sum(query_lens[:i]) for i in range(num_sequences + 1)]
        slots = [
            context_slots(tables[i], block_size, context)[context - query :]
            for i, (query, context) in enumerate(zip(query_lens, context_lens, strict=True))
        ]
        return AttentionBatch(
            slots=torch.cat(slots),
            block_tables=tables,
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device=self.device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=self.device),
            context_lens_host=list(context_lens),
            query_starts_host=starts,
            block_size=block_size,
            num_decodes=sum(n == 1 for n in query_lens),
            max_query_len=max(query_lens),
            max_context_len=max(context_lens),
        )

    def norm(self, n: int, dtype: torch.dtype) -> Norm:
        """A norm with standard normal weights."""
        return Norm(self.normal(n, dtype=dtype), NORM_EPS)

    def heads(self, num_tokens: int, head_dim: int, dtype: torch.dtype, norms: bool = False) -> HeadTransform:
        """Random angles and, where `norms`, head norms."""
        q_norm, k_norm = (self.norm(head_dim, dtype) if norms else None for _ in range(2))
        return HeadTransform(*self.angles(num_tokens, head_dim), q_norm, k_norm)

    def angles(self, num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) float32 [T, D/2] of random angles."""
        angle = self.normal(num_tokens, head_dim // 2)
        return angle.cos(), angle.sin()


def num_slots(batch: AttentionBatch) -> int:
    """Slots a cache needs for the pages of a batch, page 0 included."""
    return (batch.block_tables.numel() + 1) * batch.block_size


def context_slots(table: Tensor, block_size: int, length: int) -> Tensor:
    """int64 [length]: slots of one sequence's tokens, from its row of the block tables."""
    positions = torch.arange(length, device=table.device)
    return table[positions // block_size].long() * block_size + positions % block_size


def as_float64(kv: LayerKv) -> LayerKv:
    """The cache with the values it stands for, in float64 and without scales."""

    def wide(x: Tensor, scale: Tensor | None) -> Tensor:
        return x.double() if scale is None else x.double() * scale.double()[..., None]

    return LayerKv(wide(kv.key, kv.key_scale), wide(kv.value, kv.value_scale))
