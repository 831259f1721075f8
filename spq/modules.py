"""Packed matrices as torch modules, for transformers: correct and plain, not fast (the server has its own kernels).

Each forward makes the float matrix it needs and drops it. The scale is applied to the weight rather than to the
product: x times integers up to 127 leaves the range of float16 where x times the weight does not.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.weights import Int4Weight
from spq.entropy import CodedTensor, decode, num_blocks, row_blocks
from spq.manifest import DtypeClass, ModulePlan, Stored


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


class Int4Linear(nn.Module):
    """y = x W^T + b of groups of 4 bits; tensors as in kernels.weights.Int4Weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool, group: int, symmetric: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group = group
        groups = -(-in_features // group)
        self.qweight = _frozen(out_features, -(-in_features // 2), dtype=torch.uint8)
        self.scale = _frozen(out_features, groups, dtype=torch.float16)
        self.zero = None if symmetric else _frozen(out_features, groups, dtype=torch.uint8)
        self.bias = _frozen(out_features, dtype=torch.get_default_dtype()) if bias else None

    def weight_of(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in]."""
        packed = Int4Weight(self.qweight, self.scale, self.zero, self.group, self.in_features)
        return packed.dequantize().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        return functional.linear(x, self.weight_of(x.dtype), self.bias)


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


class Correction(LowRankLinear):
    """The pair beside a matrix: a forward hook of that module adds its product."""

    def attach(self, module: nn.Module) -> nn.Module:
        """Make `module`(x) answer with this pair's product added; it becomes its child `correction`."""
        module.correction = self
        module.register_forward_hook(lambda owner, args, y: y + owner.correction(args[0]))
        return module


class Int8Embedding(nn.Module):
    """Rows of an int8 table; qweight int8 [vocab, hidden], scale float32 [vocab]."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.qweight = _frozen(num_embeddings, embedding_dim, dtype=torch.int8)
        self.scale = _frozen(num_embeddings, dtype=torch.float32)
        self.register_buffer("dtype_probe", torch.empty(0), persistent=False)  # follows model.to(dtype)

    def weight_of(self, dtype: torch.dtype) -> Tensor:
        """The table [vocab, hidden]."""
        return (self.qweight.float() * self.scale.float()[:, None]).to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden] in the model's dtype."""
        probe: Tensor = self.get_buffer("dtype_probe")
        return (self.qweight[ids].float() * self.scale.float()[ids][..., None]).to(probe.dtype)


class Int4Embedding(Int4Linear):
    """Rows of a table of 4 bits [vocab, hidden]."""

    def __init__(self, num_embeddings: int, embedding_dim: int, group: int, symmetric: bool) -> None:
        super().__init__(embedding_dim, num_embeddings, False, group, symmetric)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.register_buffer("dtype_probe", torch.empty(0), persistent=False)  # follows model.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden] in the model's dtype."""
        flat = ids.flatten()
        zero = None if self.zero is None else self.zero[flat]
        rows = Int4Weight(self.qweight[flat], self.scale[flat], zero, self.group, self.in_features).dequantize()
        return rows.view(*ids.shape, self.in_features).to(self.get_buffer("dtype_probe").dtype)


class TiedHead(nn.Module):
    """The head that is the embedding: y = x E^T, with no tensors of its own."""

    def __init__(self, embedding: Int8Embedding | Int4Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not registered twice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., vocab] in x's dtype."""
        return functional.linear(x, self._embedding[0].weight_of(x.dtype))


class CodedIntegers(nn.Module):
    """Stands where a module's integers will be while a coded folder is loaded, to receive them as they are stored."""

    def __init__(self, name: str, entry: tuple[tuple[int, ...], DtypeClass], coded_bytes: int) -> None:
        """`name` is that of the tensor in the folder, `entry` its shape and type when decoded."""
        super().__init__()
        self._name = name
        self._shape = entry[0]
        self._dtype = torch.int8 if entry[1] == "int8" else torch.uint8
        rows, columns = self._shape
        self.zstd = _frozen(coded_bytes, dtype=torch.uint8)
        self.blocks = _frozen(num_blocks(rows * columns, row_blocks(self._shape)) + 1, dtype=torch.int64)

    def stand_in(self, root: nn.Module, prefix: str) -> None:
        """Take the place of the parameter in `root`, which is the module named `prefix`."""
        owner, _, attribute = self._name.removeprefix(f"{prefix}.").rpartition(".")
        module = root.get_submodule(owner)
        delattr(module, attribute)
        module.add_module(attribute, self)

    def give_way(self, model: nn.Module) -> None:
        """Put the decoded parameter where this stands. Raises PackedFormatError for a damaged block."""
        coded = CodedTensor(self.zstd.data.cpu(), self.blocks.data.cpu(), row_blocks(self._shape))
        decoded = decode(coded, self._shape, self._dtype, self._name, torch.get_num_threads())
        owner, _, attribute = self._name.rpartition(".")
        module = model.get_submodule(owner)
        delattr(module, attribute)
        setattr(module, attribute, nn.Parameter(decoded.to(self.zstd.device), requires_grad=False))


def packed_linear(plan: ModulePlan, bias: bool) -> nn.Module:
    """An empty module for one matrix of a packed folder, whose state names are those of the format."""
    rows, columns = plan.shape
    if plan.kind == "low_rank":
        return _pair(LowRankLinear, plan, plan.rank or 0, plan.factors or "dense", bias)
    module = _leaf(plan, plan.kind, columns, rows, bias)
    if plan.correction is None:
        return module
    pair = _pair(Correction, plan, plan.correction.rank, plan.correction.factors, False)
    return pair.attach(module)


def packed_embedding(plan: ModulePlan) -> Int8Embedding | Int4Embedding:
    """An empty table of integers."""
    if plan.kind == "int4":
        return Int4Embedding(*plan.shape, plan.group or 0, plan.symmetric)
    return Int8Embedding(*plan.shape)


PairT = TypeVar("PairT", bound=LowRankLinear)


def _pair(kind: type[PairT], plan: ModulePlan, rank: int, stored: Stored, bias: bool) -> PairT:
    rows, columns = plan.shape
    return kind(_leaf(plan, stored, columns, rank, False), _leaf(plan, stored, rank, rows, bias))


def _leaf(plan: ModulePlan, stored: Stored, columns: int, rows: int, bias: bool) -> nn.Module:
    if stored == "dense":
        return nn.Linear(columns, rows, bias=bias)
    if stored == "int8":
        return Int8Linear(columns, rows, bias)
    return Int4Linear(columns, rows, bias, plan.group or 0, plan.symmetric)
