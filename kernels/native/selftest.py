"""What an extension must get right before it may serve: products at full range, against exact integers.

Not a unit test: it runs at every start, because a CPU or compiler that nobody tried gives wrong tokens, not an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.native.int4 import int4_bound, int4_matrix
from kernels.native.int8 import int8_bound, int8_matrix
from kernels.native.library import Library, Pool
from kernels.native.matrix import PackedMatrix
from kernels.weights import Int4Weight, Int8Weight, pack_int4

# rows, inputs, outputs, inputs of one int4 scale
SHAPES = ((1, 1, 1, 2), (1, 130, 17, 32), (2, 1000, 9, 128), (7, 517, 50, 30), (13, 64, 65, 64), (200, 600, 31, 128))

Case = tuple[PackedMatrix, Tensor, Callable[[Tensor], Tensor]]  # matrix, what it is as float64, its bound by x


def fault(library: Library) -> str | None:
    """None where every product is within its bound and does not depend on other rows; else what was wrong."""
    generator = torch.Generator().manual_seed(0)
    pool = Pool(library, 2)
    for rows, inputs, outputs, group in SHAPES:
        full = torch.ones(rows, inputs)
        for matrix, weight, bound in _cases(outputs, inputs, group, pool, generator):
            for x in (full, -full, torch.randn(rows, inputs, generator=generator)):
                got = matrix.multiply(x)
                error = ((got - x.double() @ weight.t()).abs() / bound(x)).max()
                if not error <= 1:
                    return f"a product of {rows} x {inputs} x {outputs} misses its bound {float(error):.2g} times"
                if not torch.equal(got[-1:], matrix.multiply(x[-1:])):
                    return f"a row of {rows} x {inputs} x {outputs} depends on the others"
    return None


def _cases(outputs: int, inputs: int, group: int, pool: Pool, generator: torch.Generator) -> Iterator[Case]:
    """Random integers, then the largest of one sign in each row, of both kinds."""

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16)

    scale = torch.rand(outputs, generator=generator) + 0.5
    extreme = torch.full((outputs, inputs), 127, dtype=torch.int8)
    extreme[1::2] = -127
    for q in (integers(-127, 127, outputs, inputs).to(torch.int8), extreme):
        eight = Int8Weight(q, scale)
        exact = q.double() * scale.double()[:, None]
        yield int8_matrix([eight], pool), exact, lambda x, w=eight: int8_bound(x, w)  # type: ignore[misc]
    groups = -(-inputs // group)
    scales = (torch.rand(outputs, groups, generator=generator) + 0.5).half()
    largest, zero = torch.full((outputs, inputs), 15), torch.zeros(outputs, groups, dtype=torch.uint8)
    largest[1::2], zero[1::2] = 0, 15
    for values, zeros in (
        (integers(0, 15, outputs, inputs), None),
        (integers(0, 15, outputs, inputs), integers(0, 15, outputs, groups).to(torch.uint8)),
        (largest, zero),
    ):
        four = Int4Weight(pack_int4(values.to(torch.uint8)), scales, zeros, group, inputs)
        yield int4_matrix([four], pool), four.dequantize().double(), lambda x, w=four: int4_bound(x, w)  # type: ignore[misc]
