"""Structured pruning of an MLP: how many neurons each layer gives up, which ones stay, and what makes up for the rest.

Not the measurement of activations (`calibrate`, `decoder`). Two families of scores:
- of SPQ (arXiv 2602.18420): mean |up_proj output| over the calibration tokens; a layer's share falls with the logarithm
  of its mean score;
- on the input h of down_proj: E[h_j^2] ||W_down[:, j]||^2, the output energy of a neuron alone (Wanda, arXiv
  2306.11695, and FLAP, arXiv 2312.11983, use the like).

With H the second moment of h, D the dropped and K the kept neurons, the output error of dropping is
tr(W_D H_DD W_D^T). All energies are per token. For the error that is left once the mean is given back as a bias, use
the covariance H - outer(mean, mean) in the place of H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spq.tiles import round_up, tile_multiple
from spq.whiten import checked, damped, square_root

REFIT_DAMPING = 0.01  # of the mean diagonal


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


def energy_scores(diagonal: Tensor, down_weight: Tensor) -> Tensor:
    """E[h_j^2] ||W_down[:, j]||^2, float64 [width]: what dropping neuron j alone costs in output energy.

    diagonal: of the second moment of down_proj's input, [width]; down_weight [hidden, width], any float dtype.
    """
    return diagonal.double() * down_weight.double().square().sum(dim=0)


def dropping_errors(second: Tensor, down_weight: Tensor, order: Tensor) -> Tensor:
    """Output error of keeping order[:k], for every k: float64 [width + 1]; entry 0 is tr(W H W^T), the last one 0.

    Divide by entry 0 for the relative error. order: int64 [width], best first, e.g. scores sorted descending;
    down_weight [hidden, width].
    second [width, width]: exact, correlations included, by tr(W_D H_DD W_D^T) = sum over D x D of H * (W^T W), one
    product for all k; memory about four times 8 width^2 bytes. second [width] (the diagonal): neurons counted as
    independent, the cumulative sum of `energy_scores`; cheap, and wrong where neurons repeat or cancel one another
    (entry 0 too is then not the energy of the output). Raises CalibrationError for a moment that is not finite.
    """
    second, ordered = checked(second, down_weight.device), down_weight[:, order].double()
    if second.ndim == 1:
        own = energy_scores(second[order], ordered)
    else:
        shares = (ordered.T @ ordered).mul_(second[order][:, order])
        # neuron k and its partners behind it: what k adds to the error of dropping all of those
        own = shares.diagonal() + 2 * shares.triu(1).sum(dim=1)
    return _sums_from(own).clamp_min(0.0)


def refit_errors(second: Tensor, down_weight: Tensor, order: Tensor, damping: float = REFIT_DAMPING) -> Tensor:
    """As `dropping_errors`, but with `refit_kept` for every k; second is [width, width], damped as there.

    One Cholesky factor H = L L^T in the given order serves all k: what the kept neurons cannot explain of the dropped
    ones is H_DD - H_DK H_KK^-1 H_KD = L_DD L_DD^T, so the error is the sum of ||(W L)_c||^2 over columns c from k on.
    Entry 0 is tr(W H W^T) of the damped H.
    """
    second, ordered = checked(second, down_weight.device), down_weight[:, order].double()
    root = square_root(damped(second, damping)[order][:, order])
    if not root.triangular:  # no factor in this order: a moment without any energy, or far from positive
        return dropping_errors(damped(second, damping), down_weight, order)
    return _sums_from((ordered @ root.matrix).square().sum(dim=0))


def refit_kept(down_weight: Tensor, second: Tensor, kept: Tensor, damping: float = REFIT_DAMPING) -> Tensor:
    """Columns of the smaller down_proj, float32 [hidden, len(kept)], that least squares fits to the whole one's output.

    W_K + W_D H_DK H_KK^-1, the minimum of E||W h - W'h_K||^2: optimal brain surgeon's update (Hassibi and Stork 1993)
    for whole columns at once, with `damping` of the mean diagonal added to H: kept neurons that never fire keep their
    columns. kept: int64 indices; down_weight [hidden, width]; second [width, width]. Raises CalibrationError for a
    moment that is not finite.
    """
    metric = damped(checked(second, down_weight.device), damping)
    stays = torch.zeros(down_weight.shape[1], dtype=torch.bool, device=down_weight.device)
    stays[kept] = True
    dropped = (~stays).nonzero().flatten()
    wide = down_weight.double()
    lost = wide[:, dropped] @ metric[dropped][:, kept]  # [hidden, kept]
    return (wide[:, kept] + square_root(metric[kept][:, kept]).solve(lost.T).T).float()


def bias_compensation(mean: Tensor, down_weight: Tensor, dropped: Tensor) -> Tensor:
    """W_D mean_D, float32 [hidden]: the bias that gives back what the dropped neurons added on average (FLAP).

    mean [width] of down_proj's input; down_weight [hidden, width]; dropped: int64 indices. It takes
    ||W_D mean_D||^2 off the error of dropping. Beside `refit_kept` on the covariance the bias is
    W mean - W' mean_K, with W' the refitted columns.
    """
    return (down_weight[:, dropped].double() @ mean[dropped].double()).float()


def _sums_from(values: Tensor) -> Tensor:
    """Entry k is the sum of values[k:]; one entry more than values."""
    return torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1)))
