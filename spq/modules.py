"""Packed matrices as torch modules, for transformers: correct and plain, not fast (the server has its own kernels).

Each forward makes the float matrix it needs and drops it. The scale is applied to the weight rather than to the
product: x times integers up to 127 leaves the range of float16 where x times the weight does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from spq.manifest import ModulePlan


def _frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Int8Linear(nn.Module):
    """y = x (Q scale)^T + b; qweight int8 [out, in], scale float32 [out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.qweight = _frozen(out_features, in_features, dtype=torch.int8)
        self.scale = _frozen(out_features, dtype=torch.float32)
        self.bias = _frozen(out_features, dtype=torch.get_default_dtype()) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        weight = (self.qweight.float() * self.scale.float()[:, None]).to(x.dtype)
        return functional.linear(x, weight, self.bias)


class LowRankLinear(nn.Module):
    """y = up(down(x)); `down` [rank, in] has no bias."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y: Tensor = self.up(self.down(x))
        return y


class Int8Embedding(nn.Module):
    """Rows of an int8 table; qweight int8 [vocab, hidden], scale float32 [vocab]."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.qweight = _frozen(num_embeddings, embedding_dim, dtype=torch.int8)
        self.scale = _frozen(num_embeddings, dtype=torch.float32)
        self.register_buffer("dtype_probe", torch.empty(0), persistent=False)  # follows model.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden] in the model's dtype."""
        probe: Tensor = self.get_buffer("dtype_probe")
        return (self.qweight[ids].float() * self.scale.float()[ids][..., None]).to(probe.dtype)


class TiedInt8Head(nn.Module):
    """The head that is the embedding: y = x E^T, with no tensors of its own."""

    def __init__(self, embedding: Int8Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not registered twice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., vocab] in x's dtype."""
        table = self._embedding[0]
        return functional.linear(x, (table.qweight.float() * table.scale.float()[:, None]).to(x.dtype))


def packed_linear(plan: ModulePlan, bias: bool) -> nn.Module:
    """An empty module for one matrix of a packed folder, whose state names are those of the format."""
    rows, columns = plan.shape
    if plan.kind == "dense":
        return nn.Linear(columns, rows, bias=bias)
    if plan.kind == "int8":
        return Int8Linear(columns, rows, bias)
    rank = plan.rank or 0
    if plan.factors == "int8":
        return LowRankLinear(Int8Linear(columns, rank, False), Int8Linear(rank, rows, bias))
    return LowRankLinear(nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=bias))
