"""Int8, int4 and float matrices laid out for CPUs, alone or stacked where several read one input.

Not the integer GEMMs nor their error (`cpu_engines`), nor the model's operations (`cpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu_engines import Engine, two_digit_product
from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, Int8Weight, Leaf, LinearWeight, LowRankWeight

WIDEN_ELEMENTS = 1 << 19  # float32 elements widened at a time: 2 MiB stay in the cache and in reused memory
# Weights up to which widening is fastest. Zen 3, 1 thread, us at 1 / 16 / 64 rows against fbgemm: 192 x 192 23 / 45 /
# 96, 147 / 172 / 258; 1024 x 192 73 / 180 / 501, 167 / 296 / 709; 768 x 768 186 / 749 / 1474, 170 / 480 / 1583.
SMALL = 256 << 10
DIGIT_ROWS = 256  # rows multiplied at a time: bounds the digits and the products of both digits


@dataclass(slots=True)
class DigitMatrix:
    """Int8 weights multiplied by two-digit activations: a row's result depends on that row alone, bit for bit."""

    engine: Engine
    packed: Any
    out_features: int
    nbytes: int

    def multiply(self, x: Tensor) -> Tensor:
        """Exact up to `cpu_engines.digit_bound`."""
        if x.shape[0] <= DIGIT_ROWS:
            return two_digit_product(x, self.packed, self.engine)
        y = torch.empty(x.shape[0], self.out_features)
        for start in range(0, x.shape[0], DIGIT_ROWS):
            part = slice(start, start + DIGIT_ROWS)
            y[part] = two_digit_product(x[part], self.packed, self.engine)
        return y


@dataclass(slots=True)
class WidenedMatrix:
    """Int8 weights as stored, widened to float32 block by block at each use: right on any machine, 1 byte a weight.

    Rows of a result may differ in the last bits with the number of rows, as in any float32 GEMM.
    """

    qweight: Tensor  # int8 [out, in]
    scale: Tensor  # float32 [out]
    nbytes: int

    def multiply(self, x: Tensor) -> Tensor:
        """Exact up to float32 rounding."""
        block = max(1, WIDEN_ELEMENTS // self.qweight.shape[1])
        if block >= self.qweight.shape[0]:
            return F.linear(x, self.qweight.float()).mul_(self.scale)
        return torch.cat([F.linear(x, part.float()) for part in torch.split(self.qweight, block)], -1).mul_(self.scale)


@dataclass(slots=True)
class WidenedInt4Matrix:
    """Int4 weights as stored, widened to float32 block by block at each use: right on any machine.

    As with `WidenedMatrix`, rows of a result may differ in the last bits with the number of rows.
    """

    weight: Int4Weight

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.weight.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """Exact up to float32 rounding."""
        out, columns = self.weight.shape
        block = max(1, WIDEN_ELEMENTS // columns)
        parts = [F.linear(x, self.weight.rows(slice(i, i + block)).dequantize()) for i in range(0, out, block)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@dataclass(slots=True)
class FloatMatrix:
    """Float weights, kept in float32."""

    weight: Tensor  # float32 [out, in]

    @property
    def nbytes(self) -> int:
        """Bytes of the float32 copy."""
        return self.weight.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """x W^T."""
        return F.linear(x, self.weight)


class Matrix(Protocol):
    """What multiplies an input, in whatever layout."""

    def multiply(self, x: Tensor) -> Tensor:
        """x [M, in] -> [M, out]."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        ...


@dataclass(slots=True)
class Term:
    """Columns of a first matrix's product, then perhaps a second factor."""

    first: int  # index of the first matrix
    columns: slice | None  # its columns; None for all of them
    up: Matrix | None


@dataclass(slots=True)
class Output:
    """One projection of a Joint: the sum of its terms, and a bias. Only a matrix with a correction has a second term,
    which is a pair."""

    terms: list[Term]
    bias: Tensor | None  # float32 [out]


@dataclass(slots=True)
class Joint:
    """Linear maps of one input. Matrices that read the input are stacked by kind, so it is split into digits once."""

    firsts: list[Matrix]
    outputs: list[Output]

    def apply(self, x: Tensor) -> list[Tensor]:
        """x [T, in] -> one [T, out] per projection; a view with a row stride where matrices are stacked."""
        return self.finish([matrix.multiply(x) for matrix in self.firsts])

    def finish(self, products: Sequence[Tensor]) -> list[Tensor]:
        """The projections from the products of `firsts`, in order."""
        results = []
        for output in self.outputs:
            y, *corrections = (_value(term, products) for term in output.terms)
            for correction in corrections:
                y = y.add_(correction)
            results.append(y if output.bias is None else y.add_(output.bias))
        return results

    @property
    def nbytes(self) -> int:
        """Bytes of matrices and biases."""
        ups = sum(term.up.nbytes for o in self.outputs for term in o.terms if term.up is not None)
        biases = sum(o.bias.nbytes for o in self.outputs if o.bias is not None)
        return sum(m.nbytes for m in self.firsts) + ups + biases


def join(weights: Sequence[LinearWeight], lay_out: Callable[[list[Leaf]], Matrix]) -> Joint:
    """Stack the matrices of one kind that read one input, by `lay_out`; those of corrections apart from the others, so
    that the product of a single matrix is whole.

    Raises ValueError where the shapes of a weight disagree.
    """
    for weight in weights:
        _check(weight)
    joint = Joint([], [Output([], None if w.bias is None else w.bias.float()) for w in weights])
    mains = {i: w.main if isinstance(w, CorrectedWeight) else w for i, w in enumerate(weights)}
    corrections = {i: w.correction for i, w in enumerate(weights) if isinstance(w, CorrectedWeight)}
    for parts in (mains, corrections):
        _add_terms(joint, parts, lay_out)
    return joint


def _add_terms(
    joint: Joint, parts: Mapping[int, Leaf | LowRankWeight], lay_out: Callable[[list[Leaf]], Matrix]
) -> None:
    """One term more for each projection in `parts`."""
    leaves = {i: part.down if isinstance(part, LowRankWeight) else part for i, part in parts.items()}
    stacks: dict[tuple[type, int], list[int]] = {}
    for i, leaf in leaves.items():
        stacks.setdefault((type(leaf), leaf.group if isinstance(leaf, Int4Weight) else 0), []).append(i)
    for members in stacks.values():
        start = 0
        for i in members:
            stop = start + leaves[i].shape[0]
            part = parts[i]
            up = lay_out([part.up]) if isinstance(part, LowRankWeight) else None
            columns = None if len(members) == 1 else slice(start, stop)
            joint.outputs[i].terms.append(Term(len(joint.firsts), columns, up))
            start = stop
        joint.firsts.append(lay_out([leaves[i] for i in members]))


def _value(term: Term, products: Sequence[Tensor]) -> Tensor:
    product = products[term.first]
    if term.columns is not None:
        product = product[:, term.columns]
    return product if term.up is None else term.up.multiply(product)


def lay_out(leaves: Sequence[Leaf], engines: Sequence[Engine]) -> Matrix:
    """One matrix of weights of one kind, stacked along the outputs; biases are not its business."""
    quantized = [leaf for leaf in leaves if isinstance(leaf, Int8Weight)]
    if quantized:
        return lay_out_int8(_stack([w.qweight for w in quantized]), _stack([w.scale for w in quantized]), engines)
    halves = [leaf for leaf in leaves if isinstance(leaf, Int4Weight)]
    if halves:
        return WidenedInt4Matrix(_stack_int4(halves))
    return FloatMatrix(_stack([leaf.weight.float() for leaf in leaves if isinstance(leaf, DenseWeight)]))


def lay_out_int8(qweight: Tensor, scale: Tensor, engines: Sequence[Engine]) -> Matrix:
    """Int8 [out, in] by size: small ones widened, others packed by the first engine that fits, else kept as stored."""
    rows, columns = qweight.shape
    scale = scale.float()
    stored = qweight.nbytes + scale.nbytes
    widened = WidenedMatrix(qweight.contiguous(), scale.contiguous(), stored)
    if qweight.numel() <= SMALL:
        return widened
    for index, engine in enumerate(engines):
        nbytes = engine.packed_nbytes(rows, columns)
        # 512-blocks make a [4096, 96] factor 5.5 times larger in fbgemm; oneDNN takes those at 1.3x the time
        if nbytes > 1.5 * stored and index + 1 < len(engines):
            continue
        if (2 * engine.digit + 1) * 127 * columns < 2**31:
            return DigitMatrix(engine, engine.pack(qweight, scale), rows, nbytes)
    return widened


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """The parts along the first dimension; a single one is not copied."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))


def _stack_int4(parts: Sequence[Int4Weight]) -> Int4Weight:
    """Parts of one group; a symmetric one gets zero points where another has them."""
    asymmetric = any(part.zero is not None for part in parts)
    zeros = [torch.full(w.scale.shape, 8, dtype=torch.uint8) if w.zero is None else w.zero for w in parts]
    return Int4Weight(
        _stack([w.qweight for w in parts]), _stack([w.scale for w in parts]), _stack(zeros) if asymmetric else None,
        parts[0].group, parts[0].in_features,
    )  # fmt: skip


def _check(weight: LinearWeight) -> None:
    """Raises ValueError where the shapes of one weight disagree."""
    if isinstance(weight, CorrectedWeight):
        if weight.main.shape != weight.correction.shape:
            raise ValueError(f"weight of shape {weight.main.shape} has a correction of shape {weight.correction.shape}")
        if weight.correction.bias is not None:
            raise ValueError("a correction has a bias; only the main part may have one")
        _check(weight.main)
        _check(weight.correction)
        return
    if isinstance(weight, LowRankWeight):
        if weight.up.shape[1] != weight.down.shape[0]:
            raise ValueError(f"low-rank pair: down has rank {weight.down.shape[0]}, up expects {weight.up.shape[1]}")
        if weight.down.bias is not None:
            raise ValueError("low-rank pair: the first factor has a bias; only the second may have one")
        _check(weight.down)
        _check(weight.up)
        return
    rows = weight.shape[0]
    if isinstance(weight, Int8Weight) and weight.scale.shape != (rows,):
        raise ValueError(f"int8 weight of {rows} rows has scales of shape {tuple(weight.scale.shape)}")
    if isinstance(weight, Int4Weight):
        _check_int4(weight)
    if weight.bias is not None and weight.bias.shape != (rows,):
        raise ValueError(f"weight of {rows} rows has a bias of shape {tuple(weight.bias.shape)}")


def _check_int4(weight: Int4Weight) -> None:
    rows, columns = weight.shape
    if weight.group < 2 or weight.group % 2:
        raise ValueError(f"int4 weight with groups of {weight.group}: an even number is needed")
    wanted = {"qweight": (rows, -(-columns // 2)), "scale": (rows, groups := -(-columns // weight.group))}
    found = {"qweight": weight.qweight, "scale": weight.scale}
    if weight.zero is not None:
        wanted["zero"], found["zero"] = (rows, groups), weight.zero
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"int4 weight {list(weight.shape)} has {name} {list(found[name].shape)}, not {list(shape)}"
            )
    if weight.scale.dtype not in (torch.float16, torch.float32):
        raise ValueError(f"int4 weight has scales in {weight.scale.dtype}; float16 or float32 is needed")
