"""What int4 tensors mean, spelled out weight by weight."""

from __future__ import annotations

import pytest
import torch

from kernels.weights import CorrectedWeight, DenseWeight, Int4Weight, LowRankWeight, pack_int4


@pytest.mark.parametrize(("columns", "group"), [(7, 4), (8, 4), (1, 2), (9, 128)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_integer_minus_zero_times_scale(columns: int, group: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = -(-columns // group)
    q = torch.randint(0, 16, (5, columns), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 16, (5, groups), generator=generator, dtype=torch.uint8)
    scale = torch.rand(5, groups, generator=generator).half()
    packed = pack_int4(q)
    weight = Int4Weight(packed, scale, None if symmetric else zero, group, columns)
    dequantized = weight.dequantize()
    for i in range(5):
        for k in range(columns):
            byte = int(packed[i, k // 2])
            assert (byte >> 4 if k % 2 else byte & 15) == q[i, k]
            offset = 8 if symmetric else int(zero[i, k // group])
            assert dequantized[i, k] == (int(q[i, k]) - offset) * float(scale[i, k // group])
    assert weight.shape == dequantized.shape == (5, columns)
    index = torch.tensor([4, 0, 4])
    assert torch.equal(weight.rows(index).dequantize(), dequantized[index])
    assert torch.equal(weight.rows(slice(1, 3)).dequantize(), dequantized[1:3])


def test_a_correction_is_added() -> None:
    main, down, up = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    weight = CorrectedWeight(DenseWeight(main, torch.ones(4)), LowRankWeight(DenseWeight(down), DenseWeight(up)))
    assert torch.equal(weight.dequantize(), main + up @ down)
    assert weight.shape == (4, 6) and weight.nbytes == 4 * (24 + 4 + 12 + 8) and weight.bias is weight.main.bias
