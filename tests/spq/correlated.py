"""Inputs as they occur before a matrix: correlated channels of very different size; and what errors they see."""

from __future__ import annotations

import torch


def inputs(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Rows float64 [tokens, features]."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn((features, features), generator=gen, dtype=torch.float64)
    size = torch.logspace(-1, 1, features, dtype=torch.float64)[torch.randperm(features, generator=gen)]
    return torch.randn((tokens, features), generator=gen, dtype=torch.float64) @ mix * size


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def matrix(shape: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output_errors(difference: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Squared output error per row, float64 [out]."""
    wide = difference.double()
    return ((wide @ second.double()) * wide).sum(dim=1)
