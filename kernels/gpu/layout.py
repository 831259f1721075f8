"""How weights lie in GPU memory: made once at load time, read by the kernels.

Not the stored form (`kernels.weights`): K is padded to a multiple of 128 with zeros, so that the inner loop of a
GEMM needs no mask (a mask on K costs all 16-byte asynchronous copies), and matrices that share an input lie one
after the other, so that one launch serves them. Scales stay float32, one per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gpu.configs import PAD, round_up
from kernels.weights import DenseWeight, Int8Weight

ZERO_POINT = 128  # stored byte of weight 0 where `magic`


@dataclass(slots=True)
class DenseMatrix:
    """Float weights in the dtype of activations: cuBLAS serves them."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(slots=True)
class Int8Matrices:
    """One to three int8 matrices, row-major one after the other: matrix i is [rows[i], widths[i]]."""

    weight: Tensor  # flat; int8 q, or uint8 q + 128 where `magic`
    scale: Tensor  # float32 [sum of rows]
    bias: Tensor | None  # float32 [sum of rows]
    rows: tuple[int, ...]
    widths: tuple[int, ...]  # inputs, padded to a multiple of 128
    in_features: tuple[int, ...]  # inputs before padding
    magic: bool

    @property
    def nbytes(self) -> int:
        """Bytes resident, padding included."""
        return self.weight.nbytes + self.scale.nbytes + (0 if self.bias is None else self.bias.nbytes)


def dense_matrix(weight: DenseWeight, device: torch.device, dtype: torch.dtype) -> DenseMatrix:
    """Move to the device in the dtype of activations. Raises ValueError when the bias does not fit."""
    _check_vector("bias", weight.bias, weight.shape[0])
    bias = None if weight.bias is None else weight.bias.to(device, dtype)
    return DenseMatrix(weight.weight.to(device, dtype).contiguous(), bias)


def int8_matrices(
    weights: Sequence[Int8Weight], device: torch.device, magic: bool, pad_rows: bool = False
) -> Int8Matrices:
    """Lay out matrices [out, in]; with `pad_rows` out is padded too (zero rows with scale 0 give zero outputs).

    Raises ValueError when a weight is not int8 or its scale or bias does not have one entry per row.
    """
    blocks, scales, biases = [], [], []
    for weight in weights:
        out_features, in_features = weight.shape
        if weight.qweight.dtype != torch.int8:
            raise ValueError(f"qweight is {weight.qweight.dtype}; int8 is needed")
        _check_vector("scale", weight.scale, out_features)
        _check_vector("bias", weight.bias, out_features)
        rows = round_up(out_features, PAD) if pad_rows else out_features
        block = torch.zeros(rows, round_up(in_features, PAD), dtype=torch.int8, device=device)
        block[:out_features, :in_features] = weight.qweight.to(device)
        blocks.append(block)
        scales.append(_padded(weight.scale, rows, device))
        if weight.bias is not None or any(w.bias is not None for w in weights):
            bias = weight.bias if weight.bias is not None else weight.scale.new_zeros(out_features)
            biases.append(_padded(bias, rows, device))
    flat = blocks[0].view(-1) if len(blocks) == 1 else torch.cat([block.view(-1) for block in blocks])
    if magic:
        flat = flat.view(torch.uint8).bitwise_xor_(ZERO_POINT)  # q + 128 for q in [-128, 127]
    return Int8Matrices(
        weight=flat,
        scale=torch.cat(scales),
        bias=torch.cat(biases) if biases else None,
        rows=tuple(block.shape[0] for block in blocks),
        widths=tuple(block.shape[1] for block in blocks),
        in_features=tuple(weight.shape[1] for weight in weights),
        magic=magic,
    )


def _padded(vector: Tensor, length: int, device: torch.device) -> Tensor:
    out = torch.zeros(length, dtype=torch.float32, device=device)
    out[: vector.shape[0]] = vector.to(device, torch.float32)
    return out


def _check_vector(name: str, vector: Tensor | None, length: int) -> None:
    if vector is not None and tuple(vector.shape) != (length,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; [{length}] is needed, one entry per output row")
