"""What calibration remembers of the inputs of one matrix: how large they are, together and channel by channel.

Not the run that shows them (`decoder`). Everything that judges a compression by the output of a matrix needs no more
than this: with X [T, in] the inputs, one row a token, the output error of W~ is
(1/T) ||X (W - W~)^T||^2 = tr((W - W~) second (W - W~)^T).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running moments of rows of `features` channels, on one device.

    count   rows seen
    second  float64 [n, n], (1/T) X^T X; symmetric up to rounding
    mean    float64 [n], (1/T) sum of the rows
    peak    float32 [n], max |X| per channel

    Memory: 8 n^2 bytes, and 4 n^2 more while rows are added (one product in float32). Nothing is centred: the
    covariance is second - outer(mean, mean).
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.second = torch.zeros((features, features), dtype=torch.float64, device=device)
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self.peak = torch.zeros(features, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Take in rows x [..., n] of any float dtype; the product of one call is made in float32.

        A call should hold some thousand rows: the float32 sum inside one call loses about eps sqrt(rows), the sums
        over calls are float64.
        """
        rows = x.reshape(-1, x.shape[-1]).float()
        if not rows.shape[0]:
            return
        total = self.count + rows.shape[0]
        # a running mean instead of a sum: `second` needs no second matrix of its size when it is read
        self.second.mul_(self.count / total).add_(rows.T @ rows, alpha=1.0 / total)
        self.mean.mul_(self.count / total).add_(rows.sum(dim=0, dtype=torch.float64), alpha=1.0 / total)
        torch.maximum(self.peak, rows.abs().amax(dim=0), out=self.peak)
        self.count = total

    @property
    def finite(self) -> bool:
        """Whether no NaN or infinity was seen, and no square overflowed float32."""
        return bool(torch.isfinite(self.peak).all()) and bool(torch.isfinite(self.second.diagonal()).all())


def output_energy(weight: Tensor, second: Tensor) -> float:
    """tr(W H W^T) of weight [out, in] and second moments [in, in]: the mean square of its outputs, summed over them."""
    wide = weight.to(second.dtype)
    return float(((wide @ second) * wide).sum())
