"""Prepared weights and the two operations on them that vLLM's graph calls: a product and a look-up.

Not the kernels (`kernels.ops`) and not the parts of a matrix (`shards`). Both operations are opaque to torch.compile:
it sees their shapes alone, and no float copy of a matrix can be folded into its graph. They find weights by a name, as
vLLM's attention does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kernels.ops import Ops, make_ops
from kernels.weights import Leaf, LinearWeight


class Product:
    """Matrices of one input, whose products stand side by side, or a vocabulary."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        """`dtype` is that of activations. The name is made another where a model of this process has it already."""
        self.name = name
        while self.name in _PRODUCTS:
            self.name += "'"
        _PRODUCTS[self.name] = self
        self.dtype = dtype
        self.nbytes = 0
        self.columns = 0  # of the output
        self._ops: Ops | None = None
        self._parts: list[tuple[Any, slice]] = []  # prepared, and its columns
        self._table: Any = None

    def fill(self, weights: Sequence[LinearWeight], widths: Sequence[int], device: torch.device) -> None:
        """Lay out the weights on a device, whose tensors may be dropped then; each product is filled up with zeros to
        its width.

        Raises ValueError for a device that no back end serves, or for a matrix that this one does not take.
        """
        ops = self._ops = ops_on(device.type, self.dtype)
        with float32_default():
            for weight, width in zip(weights, widths, strict=True):
                prepared = ops.prepare_linear(weight)
                self._parts.append((prepared, slice(self.columns, self.columns + weight.shape[0])))
                self.columns += width
                self.nbytes += ops.nbytes(prepared)

    def fill_table(self, table: Leaf, tied_head: bool, device: torch.device) -> None:
        """Lay out a vocabulary, for `embed` and, with `tied_head`, for `multiply`. Raises as `fill`."""
        ops = self._ops = ops_on(device.type, self.dtype)
        with float32_default():
            self._table = ops.prepare_embedding(table, tied_head=tied_head)
        self.columns = table.shape[0]
        self.nbytes = ops.nbytes(self._table)

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., columns] in x's dtype."""
        assert self._ops is not None, f"{self.name} has no weights"
        rows = x.reshape(-1, x.shape[-1]).to(self._ops.dtype)
        if self._table is not None:
            y = self._ops.logits(rows, self._table)
        elif self._parts[0][1] == slice(0, self.columns):
            y = self._ops.linear(rows, self._parts[0][0])
        else:
            y = rows.new_zeros(len(rows), self.columns)
            for prepared, columns in self._parts:
                y[:, columns] = self._ops.linear(rows, prepared)
        return y.to(x.dtype).contiguous().view(*x.shape[:-1], self.columns)

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., hidden] in the dtype of activations."""
        assert self._ops is not None, f"{self.name} has no weights"
        return self._ops.embed(ids.flatten(), self._table).to(self.dtype).view(*ids.shape, -1)


_PRODUCTS: WeakValueDictionary[str, Product] = WeakValueDictionary()


@torch.library.custom_op("spq::multiply", mutates_args=())
def multiply(x: Tensor, name: str, columns: int) -> Tensor:
    """x [..., in] -> [..., columns]: the products of the weights of that name."""
    return _PRODUCTS[name].multiply(x)


@multiply.register_fake
def _(x: Tensor, name: str, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))


@torch.library.custom_op("spq::embed", mutates_args=())
def embed(ids: Tensor, name: str, hidden: int, dtype: torch.dtype) -> Tensor:
    """ids int64 [...] -> [..., hidden]: rows of the table of that name."""
    return _PRODUCTS[name].embed(ids)


@embed.register_fake
def _(ids: Tensor, name: str, hidden: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, hidden), dtype=dtype)


@lru_cache
def ops_on(device_type: str, dtype: torch.dtype) -> Ops:
    """The kernels of this process for a device: Triton on a GPU, on a CPU those that the server has there, which
    compute in float32 whatever the dtype of activations. Raises ValueError for another device."""
    if device_type == "cuda":
        return make_ops(torch.device("cuda"), dtype, "triton")  # the current one: vLLM sets it in each worker
    if device_type != "cpu":
        raise ValueError(f"spq weights on device {device_type!r}: only cuda and cpu are supported")
    with float32_default(), on_all_cores():
        return make_ops(torch.device("cpu"), torch.float32)


@contextmanager
def float32_default() -> Iterator[None]:
    """vLLM loads with the dtype of the model as torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Threads that begin here may use all cores of the process: vLLM binds its main thread to one of them, and threads
    inherit that."""
    mine = os.sched_getaffinity(0)
    torch.ones(1 << 20).add_(1)  # OpenMP's threads begin, each on its core
    cores = set().union(*(os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")))
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)
