"""Structured pruning of an MLP: how many neurons each layer gives up, and which ones stay.

Not the measurement of activations (`calibrate`, `decoder`). Rules of SPQ (arXiv 2602.18420): a neuron's score is the
mean |up_proj output| over the calibration tokens; a layer's share falls with the logarithm of its mean score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spq.config import round_up, tile_multiple


def prune_ratios(layer_means: Sequence[float], min_ratio: float, max_ratio: float) -> list[float]:
    """Share of neurons each layer loses, from its mean score.

    L = ln(v + 1e-6), n = (max L - L) / (max L - min L + 1e-8), p = min_ratio + n (max_ratio - min_ratio): the layer
    with the smallest activation loses the most.
    """
    logs = [math.log(value + 1e-6) for value in layer_means]
    top, bottom = max(logs), min(logs)
    return [min_ratio + (top - value) / (top - bottom + 1e-8) * (max_ratio - min_ratio) for value in logs]


def kept_width(width: int, ratio: float, multiple: int | None) -> int:
    """Neurons that stay: int(width (1 - ratio)), rounded up to the tile (never above `width`, never below 1)."""
    return round_up(max(1, int(width * (1.0 - ratio))), tile_multiple(width, multiple), width)


def kept_neurons(score: Tensor, count: int) -> Tensor:
    """Ascending indices int64 [count] of the largest entries of score [width]."""
    return torch.topk(score, count).indices.sort().values
