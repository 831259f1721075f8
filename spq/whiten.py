"""The square root of an input second moment: the change of variables in which a matrix's output error is its norm.

With second = S S^T the output error of W~ is tr((W - W~) second (W - W~)^T) = ||(W - W~) S||^2 (Frobenius), so the
truncated SVD of W S loses exactly its dropped squared singular values: SVD-LLM (arXiv 2403.07378, truncation-aware
data whitening).
Not the moments (`moments`) and not the decomposition (`svd`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spq.errors import CalibrationError

RELATIVE_JITTER = 1e-6  # of the mean diagonal entry, added where the moment is not positive definite
EIGEN_FLOOR = 1e-12  # of the largest eigenvalue


@dataclass(slots=True)
class Root:
    """S, float64 [n, n], with S S^T = second (plus what the fallback added)."""

    matrix: Tensor
    triangular: bool  # lower

    def undo(self, rows: Tensor) -> Tensor:
        """rows [m, n] -> rows S^-1, float64, by solving."""
        solved: Tensor
        if self.triangular:
            solved = torch.linalg.solve_triangular(self.matrix, rows, upper=False, left=False)
        else:
            solved = torch.linalg.solve(self.matrix, rows, left=False)
        return solved

    def solve(self, columns: Tensor) -> Tensor:
        """columns [n, m] -> (S S^T)^-1 columns, float64."""
        if self.triangular:
            return torch.cholesky_solve(columns, self.matrix)
        return self.undo(torch.linalg.solve(self.matrix, columns).T).T


def checked(second: Tensor, device: torch.device) -> Tensor:
    """second [n, n], or its diagonal [n], as float64 on the device. Raises CalibrationError where it is not finite."""
    moved = second.to(device, torch.float64)
    if not bool(torch.isfinite(moved).all()):
        raise CalibrationError("the second moment of a matrix's inputs is not finite; the model overflows on this text")
    return moved


def damped(second: Tensor, share: float) -> Tensor:
    """second [n, n] or [n] with `share` of its mean diagonal entry added to the diagonal; float64, a copy."""
    moved = second.to(torch.float64, copy=True)
    diagonal = moved if moved.ndim == 1 else moved.diagonal()
    diagonal.add_(share * float(diagonal.mean()))
    return moved


def square_root(second: Tensor) -> Root:
    """S of second [n, n] (its lower triangle is read) or of a diagonal [n], float64 on its device.

    Cholesky. Where that fails (dead channels, fewer tokens than channels) |lambda_min| + 1e-6 trace/n goes onto the
    diagonal first, as SVD-LLM's code does, and the metric is the damped one. Where that fails too (no trace left to
    add), eigenvectors times the roots of the eigenvalues, none below 1e-12 of the largest; a zero moment gives the
    identity, which is the plain SVD.
    """
    wide = second.double()
    if wide.ndim == 1:
        floor = EIGEN_FLOOR * float(wide.max()) if float(wide.max()) > 0 else 1.0
        spread = wide if float(wide.min()) > 0 else wide + wide.min().abs() + RELATIVE_JITTER * wide.mean()
        return Root(torch.diag(spread.clamp_min(floor).sqrt()), True)
    factor, failed = torch.linalg.cholesky_ex(wide)
    if not failed:
        return Root(factor, True)
    lowest = torch.linalg.eigvalsh(wide)[0].abs()
    shift = lowest + RELATIVE_JITTER * wide.diagonal().mean()
    moved = wide.clone()
    moved.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(moved)
    if not failed:
        return Root(factor, True)
    values, vectors = torch.linalg.eigh(wide)
    top = float(values[-1])
    floored = values.clamp_min(EIGEN_FLOOR * top) if top > 0 else torch.ones_like(values)
    return Root(vectors * floored.sqrt(), False)
