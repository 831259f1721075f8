"""The tensors of the paged key/value cache.

Not the bookkeeping (`server.scheduler.blocks`): pages here are just slots block_size * page .. + block_size.
"""

from __future__ import annotations

import torch

from kernels.ops import LayerKv
from spq.architecture import ModelSpec


def allocate(spec: ModelSpec, num_slots: int, dtype: torch.dtype, device: torch.device) -> list[LayerKv]:
    """One cache per layer. Filled, so that the memory is really there and counted."""
    shape = (num_slots, spec.num_kv_heads, spec.head_dim)

    def tensor(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).fill_(0)

    def scale() -> torch.Tensor | None:
        return tensor(*shape[:2], dtype=torch.float32) if dtype == torch.int8 else None

    return [
        LayerKv(tensor(*shape, dtype=dtype), tensor(*shape, dtype=dtype), scale(), scale())
        for _ in range(spec.num_layers)
    ]
