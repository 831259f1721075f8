"""What an extension must get right before it may serve: products at full range, against exact integers.

Not a unit test: it runs at every start, because a CPU or compiler that nobody tried gives wrong tokens, not an error.
"""

from __future__ import annotations

import torch

from kernels.native.library import Library, Pool
from kernels.native.matrix import PackedMatrix, product_bound
from kernels.weights import Int8Weight

SHAPES = ((1, 1, 1), (1, 130, 17), (2, 1000, 9), (7, 517, 50), (13, 64, 65), (200, 600, 31))  # rows, inputs, outputs


def fault(library: Library) -> str | None:
    """None where every product is within its bound and does not depend on other rows; else what was wrong."""
    generator = torch.Generator().manual_seed(0)
    pool = Pool(library, 2)
    for rows, inputs, outputs in SHAPES:
        random = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        extreme = torch.full((outputs, inputs), 127, dtype=torch.int8)
        extreme[1::2] = -127
        scale = torch.rand(outputs, generator=generator) + 0.5
        full = torch.ones(rows, inputs)
        for qweight in (random, extreme):
            matrix = PackedMatrix([Int8Weight(qweight, scale)], pool)
            for x in (full, -full, torch.randn(rows, inputs, generator=generator)):
                got = matrix.multiply(x)
                exact = x.double() @ qweight.double().t() * scale.double()
                error = ((got - exact).abs() / product_bound(x, qweight, scale, matrix.levels)).max()
                if not error <= 1:
                    return f"a product of {rows} x {inputs} x {outputs} misses its bound {float(error):.2g} times"
                if not torch.equal(got[-1:], matrix.multiply(x[-1:])):
                    return f"a row of {rows} x {inputs} x {outputs} depends on the others"
    return None
